"""What is the loss, and how is it computed without ever holding all logits?

The head multiplies a few thousand tokens at a time with the output weight, takes fp32 log-softmax, and, where gradients
are wanted, forms the chunk's gradients at once, in the forward pass. Nothing is recomputed and no full (B, T, V) tensor
exists; the backward pass only scales by the incoming scalar.

The loss is a sum, not a mean: dividing by the valid tokens of the whole global batch is the engine's part.

Shapes: B sequences, T positions, N = B T tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtrain.model.precision import linear, needs_widening
from llmtrain.model.projection import sums_in_products

IGNORE = -100
"""The target of a position that does not count."""

Reduction = Literal["sum", "none"]
Likelihood = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


class Head(nn.Module):
    """The output projection and the cross-entropy behind it. It owns `weight` (V, D)."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self._likelihood: Likelihood = likelihood

    def compile_likelihood(self) -> None:
        """Compile what stands between the head's products: one pass over the logits instead of five."""
        self._likelihood = torch.compile(likelihood, dynamic=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Logits (B, T, V) without `targets` (B, T); with them the summed NLL, or with "none" the NLL of each (B, T).

        Always fp32. "none" gives no gradients and is refused where they are wanted.
        """
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):  # which would round the logits, and the sums of the gradient
            with torch.autocast(device_type, enabled=False):
                return self.forward(hidden.bfloat16(), targets, reduction)
        if targets is None:
            return linear(hidden, self.weight.to(hidden.dtype)).float()
        tokens = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
        wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        if wants_gradients:
            assert reduction == "sum", 'reduction "none" has no backward pass: call it under torch.no_grad()'
            loss: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
                tokens, self.weight, targets.reshape(-1), self._likelihood
            )
            return loss
        nll = _chunked(tokens, self.weight, targets.reshape(-1))[0]
        return nll.sum() if reduction == "sum" else nll.view_as(targets)


class _SummedLoss(torch.autograd.Function):
    """The summed NLL, whose gradients are ready when its value is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, gradients: Likelihood) -> Tensor:
        nll, grad_hidden, grad_weight = _chunked(hidden, weight, targets, gradients)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return nll.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * scale).to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), None, None


def chunk_tokens(tokens: int, vocab_size: int, device_type: str) -> int:
    """How many tokens' logits to hold at once: all chunks about equal, none above the limit of the device.

    Every chunk passes over the weight and its gradient once, so short ones cost time: on a CPU, with a vocabulary of
    32,000, chunks of 2^21 numbers took 1.5 x the time of 2^23, and 2^24 0.9 x. A GPU has more to fill.
    """
    limit = 2**23 if device_type == "cpu" else 2**27
    most = max(1, limit // vocab_size)
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def likelihood(logits: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NLL of each target, (C,), and its gradient, softmax - onehot, (C, V) in `dtype`.

    From logits (C, V) in fp32, and targets (C, 1).
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    picked = shifted.gather(1, target)
    powers = shifted.exp_()
    total = powers.sum(dim=-1, keepdim=True)
    gradient = powers.div_(total)
    if torch.compiler.is_compiling():  # compiled, a scatter is a pass of its own; alone, a comparison is
        column = torch.arange(gradient.shape[1], device=gradient.device)
        gradient = torch.where(column == target, gradient - 1, gradient)
    else:
        gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    return (total.log() - picked).squeeze(1), gradient.to(dtype)


def _chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradients: Likelihood | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL of each token (N,) in fp32, and with `gradients` those of its sum: (N, D) as `hidden`, (V, D) in fp32."""
    N, V = hidden.shape[0], weight.shape[0]
    ignored = targets == IGNORE
    target = targets.masked_fill(ignored, 0).unsqueeze(1)  # (N, 1)
    nll = torch.empty(N, dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if gradients else hidden
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if gradients else weight
    operand = weight.to(hidden.dtype)
    operand = operand.float() if needs_widening(hidden) else operand
    size = chunk_tokens(N, V, hidden.device.type)
    for start in range(0, N, size):
        part = slice(start, start + size)
        h = hidden[part].to(operand.dtype)  # (C, D)
        logits = _product(h, operand.t())  # (C, V)
        if gradients is None:
            nll[part] = -torch.log_softmax(logits, dim=-1).gather(1, target[part]).squeeze(1)
            continue
        # Ignored rows are dropped where rows are short: in h and in its gradient, not in the (C, V) matrix.
        nll[part], gradient = gradients(logits, target[part], operand.dtype)
        skip = ignored[part].unsqueeze(1)  # (C, 1)
        grad_hidden[part] = (gradient @ operand).masked_fill_(skip, 0)
        _add_product(grad_weight, gradient.t(), h.masked_fill(skip, 0))
        del logits, gradient  # they would wait beside the next chunk's
    return nll.masked_fill_(ignored, 0), grad_hidden, grad_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32, never rounded to the operands' type where the device can do so."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in the fp32 of `total`."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif sums_in_products(a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _product(a, b)
