"""How does AdamW update parameters whose moments are kept in 8 bits?

Matrices keep theirs as `Moment`, norms in fp32. A chunk at a time is read into fp32, moved on by the gradient, used for
the update as it is, and rounded back: the rounding is in what is kept, never in the step that is made from it. The rest
is AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2). A sharded parameter is updated where its shards are:
every element and block needs nothing but itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.config import OptimConfig
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ
from llmtrain.engines.eightbit import Moment, chunks


class AdamW8bit:
    """AdamW over `groups`, as `parameter_groups` makes them, at learning rate 0."""

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        self.beta1, self.beta2 = optim.betas
        self.eps = optim.eps
        self.param_groups = [{"lr": 0.0, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Any]] = {}  # by parameter: moments, and the count of updates as `step`
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _moments(parameter)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _update(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = state["step"].double()  # stays on its device: a number read from a GPU would wait for it
        rate = lr / (1 - self.beta1**step)
        root = (1 - self.beta2**step).sqrt()
        weights, gradients = _flat(parameter), _flat(parameter.grad)
        for start, stop in chunks(weights):
            weight, gradient = weights[start:stop], gradients[start:stop]
            mean = _read(state[EXP_AVG], start, stop).lerp_(gradient, 1 - self.beta1)
            square = _read(state[EXP_AVG_SQ], start, stop).mul_(self.beta2)
            square.addcmul_(gradient, gradient, value=1 - self.beta2)
            _write(state[EXP_AVG], mean, start)
            _write(state[EXP_AVG_SQ], square, start)
            weight.mul_(1 - lr * weight_decay)
            weight.sub_(mean.mul(rate).div_(square.sqrt().div_(root).add_(self.eps)))


def _moments(parameter: Tensor) -> dict[str, Any]:
    """Zero moments: of a matrix in 8 bits, of a norm none yet, for they are as with any other optimizer."""
    if parameter.ndim == 1:
        return {}
    local = _flat(parameter)
    return {kind: Moment(local.numel(), kind == EXP_AVG, local.device) for kind in (EXP_AVG, EXP_AVG_SQ)}


def _flat(tensor: Any) -> Tensor:
    """The elements on this rank, 1-D, as a view."""
    local: Tensor = tensor.detach()
    return (local.to_local() if isinstance(local, DTensor) else local).view(-1)


def _read(kept: Any, start: int, stop: int) -> Tensor:
    return kept.read(start, stop) if isinstance(kept, Moment) else _flat(kept)[start:stop]


def _write(kept: Any, values: Tensor, start: int) -> None:
    if isinstance(kept, Moment):
        kept.write(values, start)
