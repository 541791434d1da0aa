"""What are the weights before the first update? A function of (seed, parameter name, element), nothing else.

Any range of a parameter can be asked for alone, and only the fixed chunks it touches are drawn: a sharded start equals
a whole one bit for bit, on any number of ranks and any engine, and no rank ever holds a full copy.

Norms start at 1. All else is normal with `init_std`. The two projections that write into the residual stream (`wo`,
`w_down`) are scaled by 1 / sqrt(2 layers), so that its variance does not grow with depth (Radford 2019, GPT-2, 2.3).
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import ModelConfig

CHUNK = 2**18


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by canonical name, in the decoder's order. A tied head is absent: it is the embedding."""
    D, F, V = config.hidden_size, config.ffn_size, config.vocab_size
    kv_size = config.num_kv_heads * config.head_size
    block: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (D,),
        "attention.wq.weight": (D, D),
        "attention.wk.weight": (kv_size, D),
        "attention.wv.weight": (kv_size, D),
        "attention.wo.weight": (D, D),
        "ffn_norm.weight": (D,),
        "ffn.w_gate.weight": (F, D),
        "ffn.w_up.weight": (F, D),
        "ffn.w_down.weight": (D, F),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (V, D)}
    for layer in range(config.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm.weight"] = (D,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (V, D)
    return shapes


def is_block_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of a block: neither embedding nor head nor norm."""
    return name.startswith("blocks.") and not name.endswith("norm.weight")


def initial_slice(config: ModelConfig, name: str, start: int, stop: int, seed: int) -> NDArray[np.float32]:
    """Elements [start, stop) of the flattened parameter `name` at the start of a run."""
    _require_range(config, name, start, stop)
    out = np.empty(stop - start, dtype=np.float32)
    draw_initial(out, config, name, start, seed)
    return out


def draw_initial(
    out: NDArray[np.float32], config: ModelConfig, name: str, start: int, seed: int, threads: int = 1
) -> None:
    """Fill `out`, contiguous and of one dimension, with the elements of `name` from `start` on.

    Numbers are drawn where they are to lie, by so many threads at once: each chunk has a generator of its own, and
    NumPy lets other threads run while it draws. Their number changes no bit.
    """
    stop = start + len(out)
    _require_range(config, name, start, stop)
    if name.endswith("norm.weight"):
        out.fill(1.0)
        return
    std = config.init_std
    if name.endswith(("attention.wo.weight", "ffn.w_down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    scale = np.float32(std)

    def draw(chunk: int) -> None:
        origin = chunk * CHUNK
        begin, end = max(start, origin), min(stop, origin + CHUNK)
        wanted = out[begin - start : end - start]
        generator = _generator(seed, name, chunk)
        if begin == origin:
            generator.standard_normal(out=wanted, dtype=np.float32)
        else:  # the numbers of a chunk come in order, so those before the range are drawn too
            wanted[:] = generator.standard_normal(end - origin, dtype=np.float32)[begin - origin :]
        wanted *= scale

    chunks = range(start // CHUNK, -(-stop // CHUNK))
    if threads == 1 or len(chunks) <= 1:
        for chunk in chunks:
            draw(chunk)
        return
    with ThreadPoolExecutor(min(threads, len(chunks))) as pool:
        for _ in pool.map(draw, chunks):
            pass  # what a thread raised is raised here


def _require_range(config: ModelConfig, name: str, start: int, stop: int) -> None:
    size = math.prod(parameter_shapes(config)[name])
    assert 0 <= start <= stop <= size, f"{name}: [{start}, {stop}) of {size}"


def _generator(seed: int, name: str, chunk: int) -> np.random.Generator:
    """A generator of its own for each chunk: Philox (Salmon 2011, SC'11) keyed by a hash of what the chunk is."""
    digest = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
