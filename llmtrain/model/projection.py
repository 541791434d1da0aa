"""How is a projection computed, and where does the gradient of its weight go?

By default autograd makes the gradient in the type that computes, and an engine adds it to what earlier micro-batches
gave. Told of an fp32 sum, a projection adds its gradient to it within the product: one kernel reads and writes the sum,
no bf16 gradient is ever made, and nothing is rounded on the way. CUDA's products take bf16 operands and an fp32 sum
(`torch.addmm` with `out_dtype`); elsewhere the operands are widened, which serves tests.

Shapes: N tokens, K input size, M output size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.model.precision import linear


class Linear(nn.Module):
    """A projection without bias. It owns `weight` (out, in)."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self._gradient_sum: Tensor | None = None

    def sum_gradients_into(self, total: Tensor) -> None:
        """From now on add every gradient of the weight to `total`, (out, in) fp32, and give autograd none."""
        self._gradient_sum = total

    def forward(self, x: Tensor) -> Tensor:
        if self._gradient_sum is not None and torch.is_grad_enabled():
            projected: Tensor = _SummingProjection.apply(x, self.weight, self._gradient_sum)  # type: ignore[no-untyped-call]
            return projected
        return linear(x, self.weight)


def sums_in_products(device: torch.device) -> bool:
    """Whether products on `device` can add bf16 operands to an fp32 sum."""
    return device.type == "cuda" and torch.version.hip is None


@torch.library.custom_op("llmtrain::add_weight_gradient", mutates_args={"total"})
def add_weight_gradient(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """`total += gradient.T @ x`: (M, K) fp32, of (N, M) and (N, K) in bf16."""
    if total.is_cuda:
        torch.addmm(total, gradient.t(), x, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(gradient.t().float(), x.float())


class _SummingProjection(torch.autograd.Function):
    """`linear`, whose backward pass adds the weight's gradient to a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        add_weight_gradient(ctx.total, gradient.flatten(0, -2), x.flatten(0, -2))
        return linear(gradient, weight.t()), None, None
