"""How does fp32 attention stay fast on a CPU whose products are `medium`? It alone computes in plain fp32.

`medium` sends fp32 products to oneDNN, which may use bf16 instructions. Large products gain by it. The small ones
within torch's attention kernel, one for each block of queries and keys, lose several times more. So here the kernel is
called with the setting taken back for as long as it runs, forward and backward. Both calls are operations of their own:
a compiler sees neither the setting nor what is within, and compiles around them. `torch.library.custom_op` would define
them in fewer lines, and costs more time at each call than attention over a short document.

The setting belongs to the process: products that other threads begin meanwhile are in plain fp32 too.

Shapes: B sequences, H heads, G key-value heads, T positions, Q head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmtrain.model import precision

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def medium_reaches(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `medium` would change how torch's kernel attends, and that kernel takes these tensors.

    Not on CPUs that have nothing for `medium` to use, and not under autocast, which attends in bf16.
    """
    if q.device.type != "cpu" or q.dtype != torch.float32 or not precision.CPU_MULTIPLIES_BF16:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return q.numel() > 0 and all(x.stride(-1) == 1 for x in (q, k, v))


def attend_in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in plain fp32, whatever the process's setting. (B, H, T, Q) with (B, G, T, Q) twice."""
    out: Tensor = _PlainAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


@contextmanager
def plain_fp32() -> Iterator[None]:
    """fp32 products on the CPU are in fp32, then as before."""
    before = _matmul.fp32_precision
    _matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        _matmul.fp32_precision = before


class _PlainAttention(torch.autograd.Function):
    """Causal attention that keeps what torch's would keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor
        out, row_sums = torch.ops.llmtrain.cpu_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, row_sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_q, of_k, of_v = torch.ops.llmtrain.cpu_attention_backward(gradient, *ctx.saved_tensors)
        return of_q, of_k, of_v


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum of each row (B, H, T)."""
    out, row_sums = _forward(q, k, v, is_causal=True)
    return out, row_sums


def _attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    of_q, of_k, of_v = _backward(gradient, q, k, v, out, row_sums, 0.0, True)
    return of_q, of_k, of_v


def _define(name: str, schema: str, compute: Callable[..., Any]) -> None:
    """An operation that computes in plain fp32, and whose shapes are those of torch's."""
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CPU", plain_fp32()(compute))
    torch.library.register_fake(name, compute)


_define("llmtrain::cpu_attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", _attend)
_define(
    "llmtrain::cpu_attention_backward",
    "(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor row_sums) -> (Tensor, Tensor, Tensor)",
    _attend_backward,
)
