"""In which arithmetic is a product of bf16 matrices computed?

Always with fp32 sums, rounded to bf16 once at the end. GPUs and CPUs with bf16 instructions do that themselves. Other
CPUs have only a scalar fallback, 5 to 9 x slower than fp32, so there the operands are widened first: the same products
(a product of two bf16 numbers is exact in fp32), summed in another order. Under autocast, which would choose the
fallback, they do so as well.

Shapes: M rows, K summed, N columns.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix products of its own (oneDNN's answer)."""
    asks = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(asks()) if asks is not None else False


CPU_MULTIPLIES_BF16 = _cpu_multiplies_bf16()


def needs_widening(x: Tensor) -> bool:
    """Whether products of `x` should be computed from fp32 copies of the operands."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BF16


def autocast_falls_back(x: Tensor) -> bool:
    """Whether autocast would send products of `x` to the fallback. Then leave it, and round to bf16 by hand."""
    return x.device.type == "cpu" and not CPU_MULTIPLIES_BF16 and torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, (..., K) and (N, K) to (..., N), in the type of `x`, or in that of autocast."""
    if autocast_falls_back(x):
        with torch.autocast("cpu", enabled=False):
            return linear(x.bfloat16(), weight)
    if needs_widening(x):
        return F.linear(x.float(), weight.to(x.dtype).float()).to(x.dtype)
    return F.linear(x, weight)
