"""Up to which learning rate does training hold?

The range test (Smith 2017, arXiv:1506.01186): from the start of a run, or from a checkpoint, every update takes a rate
that is a fixed factor above the last, on the batches a run would get, until the loss has clearly risen. The edge is the
last rate before it rose. It says where training breaks within a few updates, and that lies above the best peak of a
long run: the peaks to sweep are 3 to 30 times lower. The more updates are made at about one rate, the less each may do,
so edges compare only where the range and the number of updates are the same. Losses of single batches jump, so each is
smoothed to the median of the five around it, which does not lag behind as a moving average does. Weight decay is left
out: in so few updates it does nothing, and at rates that no run uses it does harm of its own.

Afterwards weights, moments and generators are what they were, bit for bit, and nothing was written.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llmtrain.checkpoint.inspect import locate
from llmtrain.checkpoint.places import step_of
from llmtrain.checkpoint.store import Checkpoint, CheckpointStore
from llmtrain.config import Config
from llmtrain.data.batches import Batch
from llmtrain.data.dataset import open_unchecked
from llmtrain.data.order import START, Consumed
from llmtrain.distributed import World, find_place, open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import Engine
from llmtrain.errors import CheckpointError, ConfigError, DivergenceError
from llmtrain.train import rng
from llmtrain.train.average import Held, copied
from llmtrain.train.feed import check_data, check_together, train_batches
from llmtrain.train.preflight import require_alike
from llmtrain.train.start import first_weights

RISE = 0.02  # of the best smoothed loss: what counts as risen
GIVE_UP = 1.25  # times the best: risen so far that the test ends
NOISE = 3.0  # times the median bend from one loss to the next but one: less than this is no rise either
FEWEST = 20  # updates from which an edge can be told


class RangeTest(NamedTuple):
    """What a test found. The three lists have one element for each update made."""

    rates: list[float]
    losses: list[float]  # before the update, nats per token
    smoothed: list[float]
    edge: float | None  # the last rate before the loss rose; None where it never did
    ended: str  # why it ended


def find_edge(
    config: Config,
    *,
    low: float,
    high: float,
    updates: int,
    from_checkpoint: str | None = None,
    prepare_command: str,
) -> RangeTest | None:
    """Test a config on its own engine, data and first batches, or on those that follow a checkpoint. Collective.

    Returns what was found on the first rank, None on the others. Nothing is written. Raises LlmtrainError.
    """
    if not 0 < low < high or updates < FEWEST:
        raise ConfigError(
            f"--from {low:g} --to {high:g} --updates {updates}: wanted 0 < from < to, {FEWEST} updates or more"
        )
    data = open_unchecked(config.data.path, prepare_command)
    check_data(config, data)
    config.batch.accumulation(find_place(os.environ).size)
    with open_world(config.engine.timeout_s, collectives=config.engine.kind != "single") as world:
        require_alike(config, data, [], world)
        check_together(data, world)
        found = None if from_checkpoint is None else _checkpoint(config, world, from_checkpoint)
        rng.seed_generators(config.run.seed, world.rank)
        engine = build_engine(config, world)
        since = START if found is None else Consumed(found.state["step"], found.state["samples"])
        engine.load(first_weights(config, world)[0] if found is None else found.reader, since.update)
        batches = train_batches(config, world, data, since)
        rates = np.geomspace(low, high, updates).tolist()
        tested = range_test(engine, lambda k: batches.update(since.update + k), rates, config.schedule.peak)
        world.barrier()
    return tested if world.first else None


def range_test(
    engine: Engine, micro_batches: Callable[[int], Sequence[Batch]], rates: Sequence[float], peak: float
) -> RangeTest:
    """Make update k (from 1) at `rates[k - 1]` from `micro_batches(k)`, until the loss has clearly risen. Collective.

    `peak` is the engine's own. Its state and this rank's generators are put back, whatever happens.
    """
    device = engine.world.device
    before, generators = copied(engine.state()), rng.capture(device)
    losses: list[float] = []
    broke = False
    ended = f"all {len(rates)} updates were made"
    try:
        for k, rate in enumerate(rates, start=1):
            stats = engine.train_step(micro_batches(k), rate / peak, 0.0)
            losses.append(stats.loss.item())
            if not math.isfinite(losses[0]):
                raise DivergenceError(f"the loss is {losses[0]} before the first update: start from other weights")
            broke = not (math.isfinite(losses[-1]) and math.isfinite(stats.grad_norm.item()))
            if broke:
                ended = f"at update {k} loss or gradient were not finite"
                break
            if k >= FEWEST and _risen(losses):
                ended = f"before update {k} the loss was more than {GIVE_UP:g} times its best"
                break
    finally:
        engine.load(Held(before), before.update)
        rng.restore(generators, device)
    smoothed = smooth(losses)
    edge = _edge(rates, losses, smoothed, broke)
    return RangeTest(list(rates[: len(losses)]), losses, smoothed, edge, ended)


def smooth(losses: Sequence[float]) -> list[float]:
    """The median of the five losses around each, of fewer at the ends; one that is not finite counts as infinite."""
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return [float(np.median(known[max(0, i - 2) : i + 3])) for i in range(len(known))]


def peaks_to_sweep(edge: float) -> list[float]:
    """The peaks that lie 30 to 3 times below an edge, each twice the last."""
    return [float(f"{edge / 30 * 2**i:.2g}") for i in range(4)]


def _risen(losses: Sequence[float]) -> bool:
    """Whether the last five losses are far above the best five in a row."""
    medians = [float(np.median(losses[i : i + 5])) for i in range(len(losses) - 4)]
    return medians[-1] > GIVE_UP * min(medians)


def _edge(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], broke: bool) -> float | None:
    """Loss i is what the updates before update i led to, so the last of these that did no harm is two before a rise.

    Where the test `broke`, its last loss is a rise.
    """
    best = np.minimum.accumulate(smoothed)
    calm = [loss for loss in losses[: max(int(np.argmin(smoothed)) + 1, FEWEST)] if math.isfinite(loss)]
    noise = float(np.median(np.abs(np.diff(calm, 2)))) if len(calm) > 2 else 0.0  # a steady fall has no bend
    risen = np.asarray(smoothed) > best + np.maximum(RISE * best, NOISE * noise)
    risen[-1] |= broke
    return rates[max(int(np.argmax(risen)) - 2, 0)] if risen.any() else None


def _checkpoint(config: Config, world: World, named: str) -> Checkpoint:
    """The whole checkpoint that RUN@STEP names, of the config's model."""
    folder, name = locate(named)
    found = CheckpointStore(folder, world, keep=2).require(step_of(name))
    if found.state["trajectory"]["model"] != config.model.model_dump(mode="json", exclude={"preset"}):
        raise CheckpointError(
            f"--from-checkpoint: {found.path} is of another model than the config's: name its own config"
        )
    return found
