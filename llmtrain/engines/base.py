"""What does the trainer ask of an engine, and what is the state of a run?

The unit is the whole update. The loss is summed cross-entropy over valid tokens divided by the valid tokens of the
whole global batch. State is flat: for each parameter, by its canonical name, the range of its flattened elements that
this rank holds, as fp32 weight and moments. A dim-0 FSDP2 shard is such a range and so is a ZeRO fragment, which is why
one checkpoint serves every engine on any number of ranks.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llmtrain.config import Config, OptimConfig
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.model.decoder import Block, Decoder

WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"


class StepStats(NamedTuple):
    """What one update did, equal on every rank."""

    loss: Tensor  # scalar: nats per valid token of the global batch, before the update
    grad_norm: Tensor  # scalar: global L2 norm before clipping
    lr: float  # read back from the optimizer that made the update


class Slice(NamedTuple):
    """Elements [start, stop) of one flattened parameter, as views into what this rank trains."""

    name: str
    start: int
    stop: int
    numel: int  # of the whole parameter
    tensors: dict[str, Tensor]  # WEIGHT, EXP_AVG, EXP_AVG_SQ: 1-D fp32


class FlatState(NamedTuple):
    """This rank's part of a run's state."""

    slices: list[Slice]
    update: int  # optimizer updates made so far
    writes: bool  # False where another rank holds the same ranges and writes them


class StateSource(Protocol):
    """Anything that can fill a FlatState: a checkpoint, or the initial values."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32 on the CPU."""
        ...


class Engine(Protocol):
    """Owns the model, its optimizer, and every collective between ranks. All methods are collective."""

    world: World

    def train_step(self, micro_batches: Sequence[Batch], lr_multiplier: float) -> StepStats:
        """One update from this rank's micro-batches, at `lr_multiplier` times the peak."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode, no gradients; training mode again afterwards."""
        ...

    def nats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood and number of valid tokens of this rank's batch, fp64 on the CPU."""
        ...

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits for `tokens`. (B, T) -> (B, T, V) fp32"""
        ...

    def state(self) -> FlatState:
        """This rank's slices as views, no copy."""
        ...

    def load(self, source: StateSource, update: int) -> None:
        """Fill every slice from `source` and go on as if `update` updates had been made."""
        ...

    def describe(self) -> str:
        """The lines the banner prints: what is sharded, in which precision."""
        ...


@dataclass
class LearningRate:
    """Writes the learning rate into an optimizer's groups, looked up afresh before every update."""

    peak: float

    def write(self, optimizer: torch.optim.Optimizer, multiplier: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.peak * multiplier * group["lr_scale"]

    @staticmethod
    def read(optimizer: torch.optim.Optimizer) -> float:
        """The rate the last update was made with."""
        return float(optimizer.param_groups[0]["lr"])


def parameter_groups(named: Iterable[tuple[str, Any]], optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay; norms and embeddings only where the config says so."""
    decayed: list[Any] = []
    plain: list[Any] = []
    for name, parameter in named:
        if name.endswith("norm.weight"):
            decays = optim.decay_norms
        elif name == "embed.weight":
            decays = optim.decay_embeddings
        else:
            decays = True
        (decayed if decays else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(named: Iterable[tuple[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW at learning rate 0; the rate is written before every update."""
    return torch.optim.AdamW(parameter_groups(named, optim), lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def start_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], update: int) -> None:
    """Zero moments where there are none, and the step count of `update` updates, for each of `parameters`."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for kind in (EXP_AVG, EXP_AVG_SQ):
            if kind not in state:
                state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] = torch.tensor(float(update), dtype=torch.float32, device=parameter.device)


def fill(slices: Sequence[Slice], source: StateSource) -> None:
    """Copy every tensor of every slice from `source`."""
    with torch.no_grad():
        for piece in slices:
            for kind, tensor in piece.tensors.items():
                tensor.copy_(source.read(piece.name, kind, piece.start, piece.stop))


def prepare_blocks(model: Decoder, config: Config) -> None:
    """Activation checkpointing and compilation, block by block; parameter names stay as they are."""
    choice = config.engine.activation_checkpointing
    every = {"none": 0, "all": 1}[choice] if isinstance(choice, str) else choice
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.recompute = bool(every) and index % every == 0
        if config.engine.compile:
            block.compile()


def count_valid(world: World, micro_batches: Sequence[Batch]) -> int:
    """Valid tokens of the whole global batch: all ranks, all micro-batches. At least 1."""
    return max(1, int(world.sum(torch.tensor(sum(batch.num_valid for batch in micro_batches))).item()))
