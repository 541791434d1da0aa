"""What would a cooldown give? An exponential moving average (EMA) of the weights, kept and judged beside them.

After update k every average moves the share 1 / min(window, k) of the way to its weight: at first it is the plain mean
of all updates, later what lies `window` updates back counts 1/e. It is fp32, one element for each element of the rank's
slices: it needs nothing of an engine but these, is sharded as they are, and is saved with them, as the kind `ema`. It
shapes no update. Where it is judged it changes places with the weights, and back, so it takes no more memory then.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.flat import EMA, FlatReader
from llmtrain.checkpoint.store import Checkpoint
from llmtrain.config import Config
from llmtrain.data.batches import Batch, ValidationSet
from llmtrain.distributed import World
from llmtrain.engines import build_engine
from llmtrain.engines.base import WEIGHT, Engine, FlatState, Slice, StateSource, StepStats, fill
from llmtrain.engines.eightbit import Unpacked
from llmtrain.train.metrics import DOCUMENTS_FILE
from llmtrain.train.validation import evaluate


def build(config: Config, world: World) -> Engine:
    """The engine that the config asks for, with the average of `validation.ema_window` where that is written."""
    engine = build_engine(config, world)
    window = config.validation.ema_window
    return engine if window is None else Averaging(engine, config.updates(window))


class Averaging:
    """An engine that keeps an average of another one's weights. `window` is in updates."""

    def __init__(self, engine: Engine, window: int) -> None:
        self.engine = engine
        self.world = engine.world
        self.window = window
        self.averages: dict[str, Tensor] = {}  # by parameter: as long as this rank's slice of it
        self._from = ""

    def train_step(
        self, micro_batches: Sequence[Batch], lr_multiplier: float, decay_multiplier: float = 1.0
    ) -> StepStats:
        stats = self.engine.train_step(micro_batches, lr_multiplier, decay_multiplier)
        flat = self.engine.state()
        weights = [piece.tensors[WEIGHT] for piece in _held(flat)]
        averages = [self.averages[piece.name] for piece in _held(flat)]
        torch._foreach_lerp_(averages, weights, 1 / min(self.window, flat.update))
        return stats

    def evaluating(self) -> AbstractContextManager[None]:
        return self.engine.evaluating()

    def nats(self, batch: Batch) -> Tensor:
        return self.engine.nats(batch)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.engine.logits(tokens)

    def state(self) -> FlatState:
        flat = self.engine.state()
        return flat._replace(slices=[self._with_average(piece) for piece in flat.slices])

    def load(self, source: StateSource, update: int) -> None:
        """As the engine does, and the average: that of the source, or, where it has none, the weights."""
        self.engine.load(source, update)
        held = _held(self.engine.state())
        self.averages = {piece.name: piece.tensors[WEIGHT].clone() for piece in held}
        self._from = f"started from the weights of update {update}"
        if isinstance(source, FlatReader) and holds_average(source):
            fill([piece._replace(tensors={EMA: self.averages[piece.name]}) for piece in held], source)
            self._from = "gone on with"

    def describe(self) -> str:
        return f"{self.engine.describe()}\nEMA of the weights over {self.window} updates, {self._from}"

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The engine has the average for its weights inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        flat = self.engine.state()
        with torch.no_grad():
            for piece in _held(flat):
                weight, average = piece.tensors[WEIGHT], self.averages[piece.name]
                before = weight.clone()
                weight.copy_(average)
                average.copy_(before)
        self.engine.load(Held(flat), flat.update)  # brings them to wherever the engine computes with them

    def _with_average(self, piece: Slice) -> Slice:
        own = {EMA: self.averages[piece.name]} if piece.name in self.averages else {}
        kept = piece.tensors.kept if isinstance(piece.tensors, Unpacked) else piece.tensors
        return piece._replace(tensors=Unpacked({**kept, **own}))


class Held:
    """What an engine holds, as a source of state for the same engine."""

    def __init__(self, flat: FlatState) -> None:
        self.tensors = {piece.name: piece.tensors for piece in flat.slices}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][kind]


def copied(flat: FlatState) -> FlatState:
    """The same slices, in host memory of their own."""
    pieces = [
        piece._replace(tensors={kind: tensor.to("cpu", copy=True) for kind, tensor in piece.tensors.items()})
        for piece in flat.slices
    ]
    return flat._replace(slices=pieces)


def judge(engine: Engine, config: Config, held_out: Sequence[ValidationSet]) -> Iterator[dict[str, Any]]:
    """The scores of each set, as `evaluate` gives them, and beside them, from `ema_` on, those of the average."""
    micro = config.validation.micro or config.batch.micro
    of_average: list[dict[str, Any]] = [{} for _ in held_out]
    if isinstance(engine, Averaging):
        with engine.averaged():
            of_average = [_named(evaluate(engine, one, micro), engine.window) for one in held_out]
    for one, beside in zip(held_out, of_average, strict=True):
        keep = Path(config.run.dir) / DOCUMENTS_FILE if one.name == "validation" else None
        yield {**evaluate(engine, one, micro, keep), **beside}


def holds_average(reader: FlatReader) -> bool:
    """Whether a checkpoint was saved with an average."""
    return any(reader.numel(name, EMA) for name in reader.names())


def left_behind(config: Config, found: Checkpoint | None) -> list[str]:
    """A line for the banner where a checkpoint holds an average that the config does not ask for."""
    if found is None or config.validation.ema_window is not None or not holds_average(found.reader):
        return []
    return [f"the EMA of the weights in {found.path} is left behind: validation.ema_window is null"]


def _named(scores: dict[str, Any], window: int) -> dict[str, Any]:
    return {f"ema_{key}": scores[key] for key in ("loss", "perplexity", "nats_per_byte")} | {"ema_window": window}


def _held(flat: FlatState) -> list[Slice]:
    """The slices of which this rank owns something."""
    return [piece for piece in flat.slices if piece.tensors]
