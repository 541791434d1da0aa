"""Which products are made in fp8, and how?

Those of the blocks' projections: forward, and both of the backward pass. torchao scales each operand to the range of
fp8 by its own largest magnitude, anew for every product, so nothing is kept between updates; `tensorwise` has one scale
an operand, `rowwise` one a row (Micikevicius 2022, arXiv:2209.05433; the recipes are torchao's). The result is bf16.
Weights, names and everything else stay as in bf16.

Only training rounds that far: in evaluation mode a projection is that of bf16, so that a score is that of the weights
as anyone else will use them.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config import Config
from llmtrain.errors import ConfigError, EnvironmentError
from llmtrain.model.decoder import Decoder
from llmtrain.model.precision import linear
from llmtrain.model.projection import Linear

OLDEST = (8, 9)  # compute capability: Ada, Hopper and newer multiply fp8
# `1b`, rowwise, compiled, on one NVIDIA H200 with torch 2.11: 0.966 s an update, and 0.941 s in bf16.
MEASURED = "measured slower than bf16 at hidden size 2048, not measured at others"


def use_fp8(model: Decoder, config: Config, device: torch.device) -> None:
    """Let the blocks' projections compute as `engine.fp8` says; on a CPU the same numbers, by way of fp32.

    Raises ConfigError where the device has no fp8 products, EnvironmentError without torchao.
    """
    if config.engine.fp8 == "none":
        return
    _require_products(device)
    float8 = _torchao()
    recipe = float8.Float8LinearConfig.from_recipe_name(config.engine.fp8)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, _as_torch_has_it(child))
    float8.convert_to_float8_training(model.blocks, config=dataclasses.replace(recipe, emulate=device.type == "cpu"))
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.forward = _while_training(module, module.forward)  # type: ignore[assignment]


def described(config: Config, device: torch.device) -> str:
    """What the banner says of it."""
    if config.engine.fp8 == "none":
        return ""
    note = "emulated on this CPU" if device.type == "cpu" else MEASURED
    return f"; products of the blocks in fp8 ({config.engine.fp8} scales, {note})"


def _require_products(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise ConfigError(
            f"engine.fp8: {torch.cuda.get_device_name(device)} has compute capability {found}, and fp8 products need "
            "8.9 or newer (Ada, Hopper, Blackwell): leave it out, or write --set engine.fp8=none"
        )


def _torchao() -> Any:
    """torchao's module for fp8, without what it logs about kernels that are not used here."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import torchao.float8
    except ImportError as error:
        raise EnvironmentError(
            f"engine.fp8 computes with torchao ({error}): pip install 'llmtrain[fp8]', or write --set engine.fp8=none"
        ) from None
    return torchao.float8


def _as_torch_has_it(ours: Linear) -> nn.Linear:
    """A module of the kind that torchao converts, around the same parameter."""
    out_size, in_size = ours.weight.shape
    made = nn.Linear(in_size, out_size, bias=False, device="meta")
    made.weight = ours.weight
    return made


def _while_training(module: nn.Linear, fp8: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return fp8(x) if module.training else linear(x, module.weight)

    return forward
