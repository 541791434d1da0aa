"""How long does an update take on one GPU, and which micro-batch and recomputation make it fastest?

A sum of what the GPU does one after the other: matrix products, attention, passes over memory, sums of gradients, the
optimizer. Each is a count (FLOPs, bytes) over a rate, and each rate is a share of the card's peak or of its memory
bandwidth that was measured on one H200; other cards are taken to reach the same shares. Measured were `1b` and
`llama-7b` in bf16 with AdamW, and the model is within 3 % of each of these runs (`tests/test_plan_speed.py`): smaller
models, whose products are less efficient, and other optimizers are slower than it says. Communication is not in it: it
overlaps with the rest, and what does not comes on top.

Letters: n tokens of a micro-batch, T tokens of a sequence, D hidden size, F feed-forward size, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmtrain.config import Config
from llmtrain.model.size import flops_per_token, matmul_parameters, parameter_count
from llmtrain.planner.activations import recomputed_blocks, sums_gradients_in_products
from llmtrain.planner.fit import changed, needs, written
from llmtrain.planner.gpus import WITHOUT_FP8, Gpu
from llmtrain.planner.state import compute_bytes, copy_ranks

# One NVIDIA H200 (989 TFLOP/s, 4.8 TB/s on its data sheet), torch 2.11, updates of 65,536 tokens.
PRODUCTS = 0.70  # of the peak: 690 TFLOP/s over all products of `llama-7b` at 16,384 tokens
HALF_SPEED_TOKENS = 300  # n at which products reach half of that: fits `llama-7b` at 2,048 tokens and at 16,384
BANDWIDTH = 4.3 / 4.8  # of the data sheet: memory copies, bytes read and written
POINTWISE_BYTES = 33.0  # a token, layer and (D + F) in bf16, compiled, both passes: fits Triton's kernels of `1b`
FORWARD = 1 / 3  # of the pointwise passes: those of `llama-7b` took 1.4 x where every block was recomputed
NOT_COMPILED = 2.9  # times as many bytes: `1b` takes 1.100 s not compiled
LOGITS_BYTES = 16  # a token and word, counted: fp32 written and read twice, their bf16 gradient written and read
SUMMED_BYTES = 8  # a parameter and micro-batch where products add to fp32 sums, counted: a sum read and written
FOLDED_BYTES = {  # where a bf16 gradient is made first
    "single": 12,  # counted: that written and read, a sum read and written
    "fsdp": 45,  # with its copies for gathering and reducing: 17 ms more than single at `1b`, 0.84 s at `llama-7b`
    "deepspeed": 28,  # ZeRO-1 takes 8 ms more than single at `1b`; the other stages are taken to need as much
}
OPTIMIZER_BYTES = 63.0  # a parameter: AdamW, norm, clipping and the bf16 copies took 0.0995 s at `llama-7b`
ATTENTION_FLOPS = 7  # times tokens, T and D, the causal half of 2 products forward and 5 backward
ATTENTION_FORWARD = 2 / 7
ATTENTION_HALF_SPEED = 740  # T at which attention reaches half its rate: 2.17 ms at 2,048 and 6.96 ms at 8,192
DETERMINISTIC = 1.1  # times as long: 1.03 to 1.15 for cuDNN
WITHIN_DOCUMENTS = 1.6  # times as long in FlexAttention where no tile is skipped: 3.97 and 2.55 ms, 3.48 and 2.17 ms
FP8_BYTES = 24.0  # an operand of a product: scaling and rounding, both ways round; `1b` with rowwise takes 0.966 s
FP8_MEASURED = "measured at hidden size 2048 alone, on an h200: 3 % slower"

RECOMPUTED: tuple[Literal["none", "cheap", "all"] | int, ...] = ("none", "cheap", 4, 2, "all")


@dataclass(frozen=True)
class Update:
    """Seconds of one update on one rank, by what they are spent on."""

    products: float
    attention: float
    pointwise: float
    fp8: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class Speed:
    """What is expected of a config: one update, tokens a second of all ranks, and model FLOPs utilisation."""

    step_seconds: float
    tokens_per_second: float
    mfu: float
    parts: Update


@dataclass(frozen=True)
class Recommendation:
    """The fastest choice that fits. `overrides` are what to change in the config, none where it is that already."""

    micro: int
    activation_checkpointing: Literal["none", "cheap", "all"] | int
    overrides: list[str]
    total: int  # bytes on a rank
    speed: Speed


def update_seconds(config: Config, ranks: int, gpu: Gpu) -> Update | None:
    """Seconds of one update by part, or None where they cannot be known: `unknown` says why."""
    peak = gpu.flops(config.engine.precision)
    if unknown(config, gpu) or peak is None or gpu.bandwidth is None:
        return None
    model, engine = config.model, config.engine
    tokens, micro_tokens = config.batch.tokens / ranks, config.batch.micro * config.batch.seq_len
    micro_batches = tokens / micro_tokens
    bandwidth = gpu.bandwidth * BANDWIDTH
    parameters = parameter_count(model)
    head = model.vocab_size * model.hidden_size
    in_blocks = matmul_parameters(model) - head
    again = recomputed_blocks(config) / model.num_layers
    in_fp8 = engine.fp8 != "none"

    product_rate = peak * PRODUCTS * micro_tokens / (micro_tokens + HALF_SPEED_TOKENS)
    block_products = tokens * in_blocks * (6 + 2 * again) / product_rate
    passes = 1 + FORWARD * (1 if engine.activation_checkpointing == "cheap" else again)
    fused = 1 if engine.compile else NOT_COMPILED
    pointwise = POINTWISE_BYTES * compute_bytes(config) / 2 * fused * passes
    widths = model.num_layers * (model.hidden_size + model.ffn_size)
    by_gradient = SUMMED_BYTES if sums_gradients_in_products(config) else FOLDED_BYTES[engine.kind]
    rounded = micro_batches * in_blocks + tokens * model.num_layers * _operand_widths(config)
    return Update(
        products=block_products / (2 if in_fp8 else 1) + tokens * head * 6 / product_rate,
        attention=_attention_flops(config, tokens, again) / (peak * _attention_share(config)),
        pointwise=tokens * (pointwise * widths + LOGITS_BYTES * model.vocab_size) / bandwidth,
        fp8=FP8_BYTES * fused * rounded * (1 + again / 3) / bandwidth if in_fp8 else 0.0,
        gradients=by_gradient * micro_batches * parameters / bandwidth,
        optimizer=OPTIMIZER_BYTES * parameters / _optimizer_ranks(config, ranks) / bandwidth,
    )


def unknown(config: Config, gpu: Gpu) -> str:
    """Why no speed is expected of a config on a GPU, or nothing."""
    if gpu.flops(config.engine.precision) is None:
        return f"the peak of {gpu.name} in {config.engine.precision} is not known"
    if gpu.bandwidth is None:
        return f"the memory bandwidth of {gpu.name} is not known: give --gpu-bandwidth (TB/s)"
    if config.engine.offload.optimizer or config.engine.offload.parameters:
        return "how fast state on the host is was not measured"
    return ""


def expected(config: Config, ranks: int, gpu: Gpu) -> Speed | None:
    """What a config should reach, whether or not it fits; None where that cannot be known."""
    parts, peak = update_seconds(config, ranks, gpu), gpu.flops(config.engine.precision)
    if parts is None or peak is None:
        return None
    seconds = sum(asdict(parts).values())
    rate = config.batch.tokens / seconds
    return Speed(seconds, rate, rate * flops_per_token(config.model, config.batch.seq_len) / (ranks * peak), parts)


def recommended(config: Config, ranks: int, gpu: Gpu) -> Recommendation | None:
    """The micro-batch and recomputation of most tokens a second within `gpu.usable`, the global batch as it is.

    None where nothing fits, or no speed can be known. Of two that are as fast, the one that needs less memory.
    """
    if unknown(config, gpu) or config.batch.sequences % ranks:
        return None
    share = config.batch.sequences // ranks
    found = []
    for micro in (count for count in range(1, share + 1) if share % count == 0):
        for choice in RECOMPUTED:
            engine: dict[str, Any] = {"activation_checkpointing": choice, "activation_memory": 1.0}
            tried = changed(config, engine, micro)
            total, speed = needs(tried, ranks), expected(tried, ranks, gpu)
            if total is not None and total <= gpu.usable and speed is not None:
                found.append(Recommendation(micro, choice, _overrides(config, tried), total, speed))
    return min(found, key=lambda one: (one.speed.step_seconds, one.total), default=None)


def fp8_words(config: Config, ranks: int, gpu: Gpu) -> str:
    """One line on what fp8 should give over bf16, and how far that was measured; empty without fp8 or a speed."""
    if config.engine.fp8 == "none":
        return ""
    if gpu.name in WITHOUT_FP8:
        return f"{gpu.name} has no fp8 products, and training refuses engine.fp8 there: write --set engine.fp8=none"
    low, bf16 = expected(config, ranks, gpu), expected(changed(config, {"fp8": "none"}), ranks, gpu)
    if low is None or bf16 is None:
        return ""
    ratio = low.step_seconds / bf16.step_seconds
    if ratio >= 1:
        return (
            f"engine.fp8 is expected to lose here: an update {ratio - 1:.0%} slower than in bf16 ({FP8_MEASURED}); "
            "leave it out, or write --set engine.fp8=none"
        )
    return (
        f"engine.fp8 is expected to make an update {1 - ratio:.0%} shorter here, which is not measured ({FP8_MEASURED})"
    )


def _attention_flops(config: Config, tokens: float, again: float) -> float:
    """Of the causal half, and of the forward pass again in recomputed blocks."""
    model = config.model
    passes = ATTENTION_FLOPS * (1 + ATTENTION_FORWARD * again)
    return passes * tokens * config.batch.seq_len * model.hidden_size * model.num_layers


def _attention_share(config: Config) -> float:
    """Of the peak: 0.45 for long sequences and heads of 64, 0.61 for those of 128, in cuDNN."""
    length = config.batch.seq_len
    share = min(0.61, 0.29 + 0.0025 * config.model.head_size) * length / (length + ATTENTION_HALF_SPEED)
    if config.data.document_mask:
        return share / WITHIN_DOCUMENTS
    return share / DETERMINISTIC if config.engine.deterministic else share


def _operand_widths(config: Config) -> int:
    """Inputs and outputs of a block's seven products, elements a token."""
    model = config.model
    keys_and_values = 2 * model.num_kv_heads * model.head_size
    inputs = 6 * model.hidden_size + model.ffn_size
    outputs = 3 * model.hidden_size + keys_and_values + 2 * model.ffn_size
    return inputs + outputs


def _optimizer_ranks(config: Config, ranks: int) -> int:
    """How many ranks share one optimizer step."""
    if config.engine.kind == "fsdp":
        return copy_ranks(config, ranks)
    return ranks if config.engine.kind == "deepspeed" and config.engine.zero_stage > 0 else 1


def _overrides(config: Config, tried: Config) -> list[str]:
    """What differs, as overrides of the config."""
    words = []
    if tried.batch.micro != config.batch.micro:
        words.append(f"batch.micro={tried.batch.micro}")
    for field in ("activation_checkpointing", "activation_memory"):
        value = getattr(tried.engine, field)
        if value != getattr(config.engine, field):
            words.append(f"engine.{field}={written(value)}")
    return words
