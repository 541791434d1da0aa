"""How does attention know positions? Rotary embedding (Su 2021, arXiv:2104.09864) in the rotate-half layout: element i
of a head is paired with element i + Q/2, as in published LLaMA weights on the Hugging Face hub.

The tables are computed in fp64, rounded once to fp32, and are neither parameters nor buffers: nothing that casts or
shards a module reaches them. The rotation is done in fp32 and its result cast.

Shapes: B sequences, T positions, H heads, Q head size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmtrain.config import ModelConfig, RopeScaling


class Rotary:
    """The cosine and sine tables of one model, made when first needed and kept on the device they were needed on."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        # (T, 1, Q) with T = max_seq_len, fp32. The sine of a head's first half is negated: there a rotation subtracts.
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Have the tables on `device`. The decoder calls this before its blocks, so that those only read."""
        if self.cos is None or self.cos.device != device:
            config = self._config
            frequency = frequencies(config.head_size, config.rope_theta, config.rope_scaling)
            position = torch.arange(config.max_seq_len, dtype=torch.float64, device="cpu")
            angle = torch.outer(position, frequency).unsqueeze(1)  # (T, 1, Q/2)
            self.cos = torch.cat((angle.cos(), angle.cos()), dim=-1).float().to(device)
            self.sin = torch.cat((-angle.sin(), angle.sin()), dim=-1).float().to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate each head of `x` by its position. (B, T, H, Q) to the same."""
        assert self.cos is not None and self.sin is not None, "prepare() comes first"
        T = x.shape[1]
        rotated: Tensor = _Rotate.apply(x, self.cos[:T], self.sin[:T])  # type: ignore[no-untyped-call]
        return rotated


def frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair, fp64, (Q/2,)."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size
    frequency = theta**-exponent
    if scaling is None:
        return frequency
    # Grattafiori 2024, arXiv:2407.21783: waves that turn often within the original context stay, slow ones are
    # stretched by `factor`, those between are blended linearly in the number of turns.
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing of `x` is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
