"""What does the trainer ask of an engine, and what is the state of a run?

The unit is the whole update. The loss is summed cross-entropy over valid tokens divided by the valid tokens of the
whole global batch. State is flat: for each parameter, by its canonical name, the range of its flattened elements that
this rank holds, as fp32 weight and moments. A dim-0 FSDP2 shard is such a range and so is a ZeRO fragment, which is why
one checkpoint serves every engine on any number of ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config import Config, OptimConfig
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.engines import fp8, numerics
from llmtrain.engines.eightbit import Moment, Unpacked
from llmtrain.model.cudnn_attention import attend_deterministically
from llmtrain.model.decoder import Block, Decoder
from llmtrain.model.kernels import choose_kernel

WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
MOMENTUM = "momentum_buffer"  # what torch.optim.Muon calls its one moment

Phase = Callable[[str], AbstractContextManager[None]]


def unmarked(name: str) -> AbstractContextManager[None]:
    """Where nobody measures: phases of an update ("forward", "backward", "optimizer") are not marked."""
    return nullcontext()


class StepStats(NamedTuple):
    """What one update did, equal on every rank."""

    loss: Tensor  # scalar: nats per valid token of the global batch, before the update
    grad_norm: Tensor  # scalar: global L2 norm before clipping
    lr: float  # of the blocks' matrices, like the next read back from the optimizer that made the update
    weight_decay: float


class Slice(NamedTuple):
    """Elements [start, stop) of one flattened parameter, as views into what this rank trains.

    Moments kept in 8 bits are the exception: each look at one makes an fp32 copy, and only `fill` writes them.
    """

    name: str
    start: int
    stop: int
    numel: int  # of the whole parameter
    tensors: Mapping[str, Tensor]  # WEIGHT, EXP_AVG and, but for the matrices of Muon, EXP_AVG_SQ: 1-D fp32


class FlatState(NamedTuple):
    """This rank's part of a run's state. Of `copies` ranks that hold the same ranges this is number `copy`."""

    slices: list[Slice]
    update: int  # optimizer updates made so far
    copy: int = 0
    copies: int = 1

    def share(self) -> list[Slice]:
        """What this rank writes: its part of the elements, of which each of the copies has as many."""
        if self.copies == 1:
            return self.slices
        total = sum(piece.stop - piece.start for piece in self.slices)
        first, last = (total * copy // self.copies for copy in (self.copy, self.copy + 1))
        mine, at = [], 0
        for piece in self.slices:
            count = piece.stop - piece.start
            begin, end = max(first - at, 0), min(last - at, count)
            if begin < end:
                tensors = Part(piece.tensors, begin, end)
                mine.append(piece._replace(start=piece.start + begin, stop=piece.start + end, tensors=tensors))
            at += count
        return mine


class Part(Mapping[str, Tensor]):
    """Elements [begin, end) of each tensor that a slice holds, looked at when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], begin: int, end: int) -> None:
        self.tensors = tensors
        self.begin, self.end = begin, end

    def __getitem__(self, kind: str) -> Tensor:
        return self.tensors[kind][self.begin : self.end]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class StateSource(Protocol):
    """Anything that can fill a FlatState: a checkpoint, or the initial values."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32 on the CPU."""
        ...


@runtime_checkable
class Writer(Protocol):
    """A StateSource that writes into the memory it is given, so that nothing is made twice."""

    def read_into(self, out: Tensor, name: str, kind: str, start: int) -> None:
        """Fill `out`, 1-D fp32 on any device, with the elements of one flattened tensor from `start` on."""
        ...


class Optimizer(Protocol):
    """What engines use of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any  # by parameter

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


class Engine(Protocol):
    """Owns the model, its optimizer, and every collective between ranks. All methods are collective."""

    world: World

    def train_step(
        self, micro_batches: Sequence[Batch], lr_multiplier: float, decay_multiplier: float = 1.0
    ) -> StepStats:
        """One update from this rank's micro-batches, at these multipliers of the peak and of the weight decay."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode, no gradients; training mode again afterwards."""
        ...

    def nats(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of every target of this rank's batch, 0 where ignored; (B, T) fp64 on the CPU."""
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
    """Writes learning rate and weight decay into an optimizer's groups, looked up afresh before every update.

    An update shrinks a weight by lr * weight_decay. Independent decay is to shrink it by weight_decay times the
    multiplier of the learning rate, so it is divided by the rest of the rate: the peak and the group's factor.
    """

    peak: float
    independent_decay: bool

    @classmethod
    def of(cls, config: Config) -> "LearningRate":
        """What a config asks for."""
        return cls(config.schedule.peak, config.optim.independent_weight_decay)

    def write(self, optimizer: Optimizer, multiplier: float, decay_multiplier: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.peak * multiplier * group["lr_scale"]
            rate = self.peak * group["lr_scale"] if self.independent_decay else 1.0
            group["weight_decay"] = group["decay"] * decay_multiplier / rate

    @staticmethod
    def read(optimizer: Optimizer) -> tuple[float, float]:
        """Learning rate and weight decay that the last update was made with, of the first group: the matrices."""
        group = optimizer.param_groups[0]
        return float(group["lr"]), float(group["weight_decay"])


def parameter_groups(named: Iterable[tuple[str, Any]], optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups by decay and learning-rate factor, the blocks' matrices first; norms and embeddings decay only
    where the config says so.
    """
    factors = optim.lr_factors.model_dump()
    grouped: dict[tuple[bool, float], list[Any]] = {(True, 1.0): []}
    for name, parameter in named:
        kind = "norm" if name.endswith("norm.weight") else name.removesuffix(".weight")
        decays = {"norm": optim.decay_norms, "embed": optim.decay_embeddings}.get(kind, True)
        grouped.setdefault((decays, factors.get(kind, 1.0)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "decay": decay, "lr_scale": factor}
        for (decays, factor), parameters in grouped.items()
        if parameters
        for decay in [optim.weight_decay if decays else 0.0]
    ]


def build_adamw(named: Iterable[tuple[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW at learning rate 0; the rate is written before every update."""
    return torch.optim.AdamW(parameter_groups(named, optim), lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def start_moments(optimizer: Optimizer, parameters: Iterable[Tensor], update: int) -> None:
    """Zero moments where there are none, and the step count of `update` updates, for each of `parameters`."""
    muon = {id(parameter) for group in optimizer.param_groups if "momentum" in group for parameter in group["params"]}
    for parameter in parameters:
        state = optimizer.state[parameter]
        for kind in (MOMENTUM,) if id(parameter) in muon else (EXP_AVG, EXP_AVG_SQ):
            if kind not in state:
                state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] = torch.tensor(float(update), dtype=torch.float32, device=parameter.device)


def moments(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's moments of one parameter, by kind. Muon's is a running mean of gradients, as AdamW's first is."""
    if MOMENTUM in state:
        return {EXP_AVG: state[MOMENTUM]}
    return {EXP_AVG: state[EXP_AVG], EXP_AVG_SQ: state[EXP_AVG_SQ]}


def flattened(held: Mapping[str, Any], flat: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
    """What a slice says it holds: `flat` of each tensor, and of moments in 8 bits what can be read from them."""
    if any(isinstance(one, Moment) for one in held.values()):
        return Unpacked({kind: one if isinstance(one, Moment) else flat(one) for kind, one in held.items()})
    return {kind: flat(one) for kind, one in held.items()}


def fill(slices: Sequence[Slice], source: StateSource) -> None:
    """Copy every tensor of every slice from `source`."""
    with torch.no_grad():
        for piece in slices:
            kept = piece.tensors.kept if isinstance(piece.tensors, Unpacked) else piece.tensors
            for kind, one in kept.items():
                if isinstance(source, Writer) and isinstance(one, Tensor) and one.dtype == torch.float32:
                    source.read_into(one, piece.name, kind, piece.start)
                else:
                    one.copy_(source.read(piece.name, kind, piece.start, piece.stop))


@contextmanager
def inference(module: Any) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; training mode again afterwards."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def score(forward: Callable[..., Tensor], batch: Batch, device: torch.device) -> Tensor:
    """Negative log-likelihood of every target of a batch, 0 where ignored. (B, T) fp64 on the CPU"""
    batch = batch.to(device)
    return forward(batch.tokens, batch.targets, batch.document_ids, reduction="none").cpu().double()


def prepare_blocks(model: Decoder, config: Config, device: torch.device) -> None:
    """Activation checkpointing and compilation, block by block; parameter names stay as they are."""
    kernel = choose_kernel(config).kernel if device.type == "cuda" else None
    model.always_tiled = kernel == "flex"
    choice = config.engine.activation_checkpointing
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if kernel == "cudnn" and config.engine.deterministic:
            block.attention.whole = attend_deterministically
        if isinstance(choice, str):
            block.recompute = choice
        elif index % choice == 0:
            block.recompute = "all"
        if config.engine.compile:
            block.compile_body()
    if config.engine.compile:
        torch._functorch.config.activation_memory_budget = config.engine.activation_memory
        model.head.compile_likelihood()


def details(config: Config, device: torch.device) -> str:
    """What the banner adds: where less is kept or computed with than the precision says, and which kernels compute."""
    moments_too = "; moments of matrices in 8 bits" if config.optim.name == "adamw8bit" else ""
    return "\n".join([f"{moments_too}{fp8.described(config, device)}", *numerics.described(config, device)])


def summed(world: World, value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place and on its device, so that no rank waits for its device here."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def count_valid(world: World, micro_batches: Sequence[Batch]) -> int:
    """Valid tokens of the whole global batch: all ranks, all micro-batches. At least 1.

    No message is sent where every batch is known to be valid on every rank, as those of training are.
    """
    own = sum(batch.num_valid for batch in micro_batches)
    if all(batch.all_valid for batch in micro_batches):
        return max(1, own * world.size)
    return max(1, int(world.sum(torch.tensor(own)).item()))
