"""Which attention kernel is the fastest on this GPU, and which gives the same bits each time?

    python -m tests.benchmarks.attention                         # every kernel that is there, each in its own process
    python -m tests.benchmarks.attention --kernels cudnn flex
    python -m tests.benchmarks.attention --tiny                  # the same path in a tiny shape

One layer's attention in bf16, causal, forward and backward, over 16,384 tokens: milliseconds by CUDA events, the median
of ten. `same_bits` says whether five backward passes gave equal gradients. Runs choose by the table in
`llmtrain.model.kernels`. Deterministic rows are made under `torch.use_deterministic_algorithms`, as
`engine.deterministic` does.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

TOKENS = 16_384
SHAPES = [  # heads, key-value heads, head size, sequence
    (12, 12, 64, 512),
    (12, 12, 64, 2048),
    (32, 4, 64, 4096),
    (32, 32, 128, 2048),
    (32, 8, 128, 8192),
]
TINY = [(2, 1, 16, 256)]
KERNELS = ("cudnn", "flash", "flex", "flash4", "flash3")
LIBRARIES = {"flash3": "FA3", "flash4": "FA4"}
DOCUMENT = 512  # tokens of each document, where attention stays within documents
ROOT = Path(__file__).parent.parent.parent


def attention_of(kernel: str, seq_len: int, documents: bool, device: str) -> Callable[..., Tensor]:
    """A kernel as a function of q, k, v, (B, H, T, Q) with (B, G, T, Q) twice."""
    if kernel == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (query // DOCUMENT == key // DOCUMENT if documents else query >= key)

        mask = create_block_mask(sees, None, None, seq_len, seq_len, device=device)
        fused = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return lambda q, k, v: fused(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )

    return scaled


def measure(kernel: str, shape: tuple[int, int, int, int], deterministic: bool, documents: bool, device: str) -> Any:
    """One row: milliseconds forward and backward, and whether gradients are the same each time."""
    heads, kv_heads, head_size, seq_len = shape
    batch = max(1, TOKENS // seq_len) if device == "cuda" else 1
    generator = torch.Generator(device).manual_seed(0)

    def drawn(count: int) -> Tensor:  # laid out as projections make it: (B, T, H, Q)
        values = torch.randn(batch, seq_len, count, head_size, generator=generator, device=device)
        return values.bfloat16().transpose(1, 2).requires_grad_()

    q, k, v = drawn(heads), drawn(kv_heads), drawn(kv_heads)
    gradient = torch.randn(batch, seq_len, heads, head_size, generator=generator, device=device).bfloat16()
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    attend = attention_of(kernel, seq_len, documents, device)

    def both() -> list[Tensor]:
        out = attend(q, k, v)
        return list(torch.autograd.grad(out, (q, k, v), gradient.transpose(1, 2)))

    first = both()
    same = all(torch.equal(a, b) for _ in range(4) for a, b in zip(first, both(), strict=True))
    taken = [_timed(both, device) for _ in range(10 if device == "cuda" else 2)]
    work = 3.5 * 2 * batch * heads * seq_len**2 * head_size  # FLOPs, the causal half
    row = {"kernel": kernel, "heads": heads, "kv_heads": kv_heads, "head_size": head_size, "seq_len": seq_len}
    row |= {"deterministic": deterministic, "documents": documents, "same_bits": same}
    return row | {"ms": round(median(taken), 4), "tflops": round(work / median(taken) / 1e9, 1)}


def _timed(work: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call."""
    if device != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def rows_of(kernel: str, shapes: list[tuple[int, int, int, int]], device: str) -> None:
    """Print the rows of one kernel, each as it is measured, as a line of JSON."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if kernel in LIBRARIES:
        torch.nn.attention.activate_flash_attention_impl(LIBRARIES[kernel])
    backend = SDPBackend.CUDNN_ATTENTION if kernel == "cudnn" else SDPBackend.FLASH_ATTENTION
    for deterministic in (False,) if kernel == "cudnn" else (False, True):
        for shape in shapes:
            for documents in (False, True) if kernel == "flex" and not deterministic else (False,):
                try:
                    with sdpa_kernel(backend):
                        row = measure(kernel, shape, deterministic, documents, device)
                except Exception as error:
                    said = (str(error) or repr(error)).strip().splitlines()[0][:200]
                    row = {"kernel": kernel, "shape": shape, "deterministic": deterministic, "failed": said}
                print(json.dumps(row), flush=True)


def main() -> None:
    """Measure each kernel in a process of its own, or, in such a process, one kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--only", choices=KERNELS, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit-s", type=float, default=120, help="longest that one kernel may take")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = TINY if given.tiny else SHAPES
    if given.only:
        rows_of(given.only, shapes, device)
        return
    for kernel in given.kernels:
        command = [sys.executable, "-m", "tests.benchmarks.attention", "--only", kernel]
        try:
            subprocess.run([*command, *(["--tiny"] if given.tiny else [])], cwd=ROOT, timeout=given.limit_s)
        except subprocess.TimeoutExpired:
            print(json.dumps({"kernel": kernel, "failed": f"no answer in {given.limit_s:.0f} s"}), flush=True)


if __name__ == "__main__":
    main()
