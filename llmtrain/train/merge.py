"""What would a cooldown give? A weighted mean of the checkpoints that a run has kept, judged beside the newest.

Training at a constant rate and merging afterwards stands for a decay of the rate (Tian 2025, arXiv:2507.17634). With n
checkpoints, what was learnt between checkpoint j - 1 and j counts w_j = g(y_j) where checkpoint j has the share
c_j = w_j - w_(j+1) (w_0 = 1, w_n = 0) and g is the decay's shape. A decay goes over the span of the checkpoints and one
mean interval more; y_j is how far through it the middle of the interval is, j / n where the checkpoints are equally far
apart. There `linear` is `uniform`, the plain mean (LAWA, Kaddour 2022, arXiv:2209.14981).

The merged weights are a source of state like a checkpoint: each range is summed in fp64 from the same range of every
checkpoint, a piece at a time, and rounded once, so no second model is ever held.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from llmtrain.checkpoint.files import PIECE, require_empty
from llmtrain.checkpoint.flat import EMA
from llmtrain.checkpoint.imported import write_import
from llmtrain.checkpoint.inspect import list_checkpoints
from llmtrain.checkpoint.store import Checkpoint, CheckpointStore
from llmtrain.config_file import checkpoints_of
from llmtrain.data.dataset import TOKENIZER_FILE, open_data
from llmtrain.engines.base import WEIGHT, StateSource
from llmtrain.errors import CheckpointError, ConfigError, did_you_mean
from llmtrain.model.initial import parameter_shapes
from llmtrain.schedules import Schedule
from llmtrain.schedules.phases import cooldown_curve
from llmtrain.train.average import holds_average
from llmtrain.train.feed import validation_sets
from llmtrain.train.saved import opened
from llmtrain.train.validation import evaluate

Shape = Literal["uniform", "linear", "1-sqrt", "cosine", "mirror-cosine", "square", "half-life"]
SHAPES: tuple[Shape, ...] = get_args(Shape)


class Merged:
    """A source of state: weighted sums of weights, zero moments."""

    def __init__(self, parts: Sequence[tuple[float, StateSource]], kind: str = WEIGHT) -> None:
        self.parts = parts
        self.kind = kind  # which of the sources' tensors are taken for weights

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32."""
        out = torch.zeros(stop - start)
        if kind != WEIGHT:
            return out
        for at in range(start, stop, PIECE):
            end = min(stop, at + PIECE)
            total = torch.zeros(end - at, dtype=torch.float64)
            for share, source in self.parts:
                total.add_(source.read(name, self.kind, at, end).double(), alpha=share)
            out[at - start : end - start] = total
        return out


class Averages(NamedTuple):
    """What `average_run` found."""

    steps: list[int]  # of the checkpoints merged, the oldest first
    rows: list[dict[str, Any]]  # scores: `weights` says of which, `shares` how the checkpoints count
    warnings: list[str]


def shares(steps: Sequence[int], shape: Shape) -> list[float]:
    """What each of the checkpoints of these updates, the oldest first, counts in their mean. They sum to 1."""
    if shape == "uniform":
        return [1 / len(steps)] * len(steps)
    at = np.asarray(steps, np.float64)
    spacing = (at[-1] - at[0]) / (len(at) - 1)
    y = ((at[1:] + at[:-1]) / 2 - at[0] + spacing / 2) / (at[-1] - at[0] + spacing)
    counts = np.concatenate([[1.0], cooldown_curve(shape, y, 0.0), [0.0]])
    return (counts[:-1] - counts[1:]).tolist()  # type: ignore[no-any-return]


def average_run(
    run_dir: Path,
    *,
    last: int | None = None,
    steps: Sequence[int] | None = None,
    shapes: Sequence[str] = SHAPES,
    out: Path | None = None,
) -> Averages:
    """Score the newest of the checkpoints, its EMA where it has one, and the checkpoints merged in each of `shapes`.

    The checkpoints are those of `steps`, or the newest `last`, or all that are published. With `out` the merged weights
    are written there, for `run.init_from`. Raises ConfigError or CheckpointError for what cannot be merged.
    """
    wanted = [_shape(text) for text in shapes]
    if out is not None:
        if len(wanted) != 1:
            raise ConfigError("--out writes one mean: name its --shape")
        require_empty(out)
    chosen = _chosen(run_dir, last, steps)
    with opened(run_dir, chosen[-1]) as (config, engine, newest):
        store = CheckpointStore(checkpoints_of(run_dir), engine.world, keep=2)
        checkpoints = [*(store.require(step) for step in chosen[:-1]), newest]
        data = open_data(config.data.path, f"llmtrain prepare --config {run_dir / 'config.yaml'}")
        held_out, micro = validation_sets(config, data), config.validation.micro or config.batch.micro
        rows = []
        for name, own, source in _candidates(checkpoints, wanted):
            engine.load(source, newest.step)
            facts = {"weights": name, "step": newest.step, "shares": own}
            rows += [{**facts, **evaluate(engine, one, micro)} for one in held_out]
        if out is not None:
            _, own, source = list(_candidates(checkpoints, wanted))[-1]
            told = f"{run_dir}: {wanted[0]} mean of the checkpoints of updates {', '.join(map(str, chosen))}"
            pieces = partial(_pieces, source, parameter_shapes(config.model))
            write_import(out, config.model, pieces, told, Path(config.data.path) / TOKENIZER_FILE)
    return Averages(chosen, rows, _warnings(newest, chosen))


def _candidates(
    checkpoints: Sequence[Checkpoint], shapes: Sequence[Shape]
) -> Iterator[tuple[str, list[float], StateSource]]:
    """What is scored: its name, the share of each checkpoint, and where its weights come from."""
    readers = [found.reader for found in checkpoints]
    newest = [0.0] * (len(readers) - 1) + [1.0]
    yield "newest", newest, readers[-1]
    if holds_average(readers[-1]):
        yield "ema", newest, Merged([(1.0, readers[-1])], EMA)
    for shape in shapes:
        own = shares([found.step for found in checkpoints], shape)
        yield shape, own, Merged(list(zip(own, readers, strict=True)))


def _pieces(source: StateSource, shapes: dict[str, tuple[int, ...]], name: str) -> Iterator[Tensor]:
    numel = math.prod(shapes[name])
    for start in range(0, numel, PIECE):
        yield source.read(name, WEIGHT, start, min(numel, start + PIECE))


def _shape(text: str) -> Shape:
    for shape in SHAPES:
        if shape == text:
            return shape
    raise ConfigError(f'--shape "{text}" is not a shape to merge with{did_you_mean(text, SHAPES)}')


def _chosen(run_dir: Path, last: int | None, steps: Sequence[int] | None) -> list[int]:
    """The updates whose checkpoints are merged, the oldest first."""
    there = sorted(row.step for row in list_checkpoints(run_dir) if row.state == "published")
    held = f"{run_dir} holds the checkpoints of " + (f"updates {', '.join(map(str, there))}" if there else "no update")
    if steps is not None:
        missing = sorted(set(steps) - set(there))
        if missing:
            raise CheckpointError(f"--steps: there is no checkpoint of update {missing[0]}; {held}")
        chosen = sorted(set(steps))
    else:
        chosen = there if last is None else there[-last:]
    wanted = 2 if last is None or steps is not None else max(last, 2)
    if len(chosen) < wanted:
        raise CheckpointError(
            f"{held}: wanted {wanted} or more to merge; train with a larger checkpoint.keep, or with keep_every"
        )
    return chosen


def _warnings(newest: Checkpoint, steps: Sequence[int]) -> list[str]:
    schedule = Schedule.from_spec(newest.state["schedule"])
    before, after = schedule.lr(steps[0]), schedule.lr(steps[-1])
    if math.isclose(before, after, rel_tol=0.01):
        return []
    return [
        f"the learning rate went from {before:.3g} to {after:.3g} over these checkpoints: a mean stands for a cooldown "
        "where it was constant; here it comes on top of what the schedule did"
    ]
