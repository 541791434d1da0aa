"""What does one micro-batch keep for its backward pass, and what does it need for a moment?

As `llmtrain/model/` computes on a GPU: fused norms keep their input, fused attention keeps q, k, v, its output and a
sum a head, SwiGLU keeps four feed-forward tensors, a recomputed block only its input, and one that recomputes what is
cheap its input and what products and attention made. A compiled block computes the gate's SiLU again, and where
products are in fp8 also what they multiply. The head's logits exist for one chunk of tokens. Attention within documents
keeps the same, and a table of tiles that is shared by all blocks; on a CPU the output of each document besides.

Letters: n tokens, D hidden size, F feed-forward size, V vocabulary, c bytes of the compute type, r of the residual.
"""

import math
from dataclasses import dataclass

from llmtrain.config import Config
from llmtrain.planner.state import FP32, Bytes, compute_bytes

CHUNK_ELEMENTS = {"cuda": 2**27, "cpu": 2**23}
TILE = 128  # positions, as in `llmtrain.model.attention`, which needs torch
INT32 = 4


@dataclass(frozen=True)
class MicroBatch:
    """Bytes by kind at the end of the forward pass, in the head, and while the last block is gone back through."""

    forward: Bytes
    backward: Bytes


def micro_batch(config: Config, device: str = "cuda") -> MicroBatch:
    """What the micro-batch of `config` needs on one rank."""
    model, n = config.model, config.batch.micro * config.batch.seq_len
    c = compute_bytes(config)
    r = FP32 if _autocasts(config) else c
    D, F, V = model.hidden_size, model.ffn_size, model.vocab_size
    recomputed = recomputed_blocks(config)
    block = block_bytes(config, device)
    kept = recomputed * r * n * D + (model.num_layers - recomputed) * block + document_bytes(config, device)
    inputs = 2 * 8 * n
    multiplied = FP32 if device == "cpu" else c  # a CPU's products are planned as if it had no bf16 instructions
    chunk = chunk_tokens(n, V, device)
    rope = 2 * FP32 * model.max_seq_len * model.head_size
    summed = device == "cuda" and sums_gradients_in_products(config)
    again = plain_block_bytes(config, device) if config.engine.activation_checkpointing != "none" else 0
    going_back = max(c * n * (2 * F + D) + (0 if summed else c * D * F), attention_bytes(config, device)) + again
    return MicroBatch(
        forward={
            "activations": kept + inputs + n * ((r + 2 * c) * D + FP32),
            "logits": logits_bytes(chunk, V, multiplied),
            "workspace": rope + 2 * FP32 * V * D,
        },
        backward={"activations": kept + inputs, "workspace": rope + going_back},
    )


def block_bytes(config: Config, device: str = "cuda") -> int:
    """What one block keeps that is not recomputed whole."""
    if config.engine.activation_checkpointing != "cheap":
        return plain_block_bytes(config, device)
    model, n = config.model, config.batch.micro * config.batch.seq_len
    c = compute_bytes(config)
    residual = FP32 if _autocasts(config) else c
    D, F = model.hidden_size, model.ffn_size
    kv = model.num_kv_heads * model.head_size
    return n * (residual * D + c * (3 * D + 2 * kv + 2 * F) + FP32 * model.num_heads)


def plain_block_bytes(config: Config, device: str = "cuda") -> int:
    """What one block keeps where nothing is recomputed."""
    model, n = config.model, config.batch.micro * config.batch.seq_len
    c = compute_bytes(config)
    D, F = model.hidden_size, model.ffn_size
    kv = model.num_kv_heads * model.head_size
    apart = c * D if config.data.document_mask and device == "cpu" else 0  # each document's output, before they are one
    residual = 2 * D * (FP32 if _autocasts(config) else c)
    normed = (5 if _autocasts(config) else 2) * D * c  # autocast rounds a norm's output for each projection
    wide = 3 if config.engine.compile else 4
    if config.engine.compile and config.engine.fp8 != "none":
        normed, wide = 0, 2
    sums = FP32 * (model.num_heads + 2)
    return n * (residual + normed + c * (2 * D + 2 * kv + wide * F) + apart + sums)


def attention_bytes(config: Config, device: str = "cuda") -> int:
    """What attention's backward pass works in on a GPU: fp32 gradients of the queries, and k and v for every head.

    cuDNN's deterministic form keeps those gradients apart for each block of keys. Measured with cuDNN 9.19 on Hopper.
    Where the kernel is not written, it is taken to be cuDNN's, which needs most; within documents it never is.
    """
    if device != "cuda" or config.engine.precision != "bf16":
        return 0
    model, n = config.model, config.batch.micro * config.batch.seq_len
    keys = 128 if model.head_size <= 64 else 256
    by_cudnn = config.engine.attention in ("auto", "cudnn") and not config.data.document_mask
    apart = math.ceil(config.batch.seq_len / keys) if config.engine.deterministic and by_cudnn else 1
    repeated = 2 * compute_bytes(config) if model.num_kv_heads < model.num_heads else 0
    return n * model.num_heads * model.head_size * (FP32 * apart + repeated)


def document_bytes(config: Config, device: str = "cuda") -> int:
    """What says which positions are of one document: their numbers, and on a GPU two tables of tiles, of whole ones and
    others, each by queries and by keys.
    """
    if not config.data.document_mask:
        return 0
    micro, T = config.batch.micro, config.batch.seq_len
    tiles = -(-T // TILE)
    return INT32 * micro * (T + (4 * tiles * (tiles + 1) if device == "cuda" else 0))


def recomputed_blocks(config: Config) -> int:
    """How many blocks the backward pass computes again."""
    choice = config.engine.activation_checkpointing
    every = {"none": 0, "cheap": 0, "all": 1}[choice] if isinstance(choice, str) else choice
    return math.ceil(config.model.num_layers / every) if every else 0


def sums_gradients_in_products(config: Config) -> bool:
    """Whether products add gradients of weights to fp32 sums, and make none in bf16: `llmtrain.engines.single`."""
    engine = config.engine
    accumulates = config.batch.sequences > config.batch.micro
    return engine.kind == "single" and engine.precision == "bf16" and engine.fp8 == "none" and accumulates


def logits_bytes(chunk: int, vocab_size: int, c: int) -> int:
    """Everything of the shape of a chunk's logits that is there at once.

    Logits and their softmax in fp32, and that rounded to what is multiplied. Nothing is left when the next chunk
    begins. The head leaves autocast: it is as in bf16.
    """
    return chunk * vocab_size * (2 * FP32 + (c if c < FP32 else 0))


def chunk_tokens(tokens: int, vocab_size: int, device: str) -> int:
    """How many tokens' logits the head holds at once, as `llmtrain.model.loss.chunk_tokens`, which needs torch."""
    most = max(1, CHUNK_ELEMENTS[device] // vocab_size)
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _autocasts(config: Config) -> bool:
    engine = config.engine
    return engine.kind == "deepspeed" and engine.zero_stage == 0 and engine.precision == "bf16"
