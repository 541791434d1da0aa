"""From what does a run start: fresh initial values, a checkpoint of another run, or the newest one of its own?

A checkpoint is gone on from only where what shaped the loss is the same; the schedule and the global batch may change
where the user says how (`llmtrain.train.join`). Everything else may change freely: the engine, the number of ranks, the
micro-batch, when to validate.
"""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llmtrain.checkpoint.imported import open_import
from llmtrain.checkpoint.inspect import locate
from llmtrain.checkpoint.places import step_of
from llmtrain.checkpoint.store import Checkpoint, CheckpointStore
from llmtrain.config import Config
from llmtrain.config_file import checkpoints_of, load_config
from llmtrain.data.order import START, Consumed
from llmtrain.device import usable_cores
from llmtrain.distributed import World, find_place
from llmtrain.engines.base import WEIGHT, Engine, StateSource
from llmtrain.errors import CheckpointError, LlmtrainError, ScheduleError
from llmtrain.model.initial import draw_initial
from llmtrain.schedules import Schedule
from llmtrain.train.join import Mode, ScheduleChange, Segments, join, last_update, require_same_trajectory
from llmtrain.trajectory import read_import, trajectory_of

RESUME_MODES = ("auto", "must", "never")
BUFFER = 2**24  # elements on their way to a GPU: 64 MiB


class InitialValues:
    """Update 0 as a source of state: weights by (seed, name), zero moments.

    Weights are drawn by all cores of this rank, straight into memory of the host, or by way of a buffer to a GPU.
    """

    def __init__(self, config: Config, threads: int | None = None) -> None:
        self.config = config
        self.threads = own_cores() if threads is None else threads
        self._buffer = torch.empty(0)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32."""
        out = torch.empty(stop - start)
        self.read_into(out, name, kind, start)
        return out

    def read_into(self, out: Tensor, name: str, kind: str, start: int) -> None:
        """Fill `out`, 1-D fp32, with the elements from `start` on."""
        if kind != WEIGHT:
            out.zero_()
        elif out.device.type == "cpu" and out.is_contiguous():
            self._draw(out, name, start)
        else:
            self._buffer = self._buffer if self._buffer.numel() else torch.empty(BUFFER)
            for begin in range(0, out.numel(), BUFFER):
                part = out[begin : begin + BUFFER]
                drawn = self._buffer[: part.numel()]
                self._draw(drawn, name, start + begin)
                part.copy_(drawn)

    def _draw(self, out: Tensor, name: str, start: int) -> None:
        draw_initial(out.detach().numpy(), self.config.model, name, start, self.config.run.seed, self.threads)


def own_cores() -> int:
    """Cores for this rank: those it may use, and no more than its share of the node's among the ranks there."""
    share = (os.cpu_count() or 1) // find_place(os.environ).local_size
    return max(1, min(usable_cores(), share))


class Start(NamedTuple):
    """Where training begins, and what it goes on with."""

    how: Literal["fresh", "branched", "resumed"]
    since: Consumed  # updates already made, samples already consumed
    schedule: Schedule  # of the whole run, with every join
    segments: Segments  # the global batches of the whole run
    lineage: list[dict[str, Any]]  # the checkpoints of other runs that this one goes back to, the oldest first
    found: Checkpoint | None  # the checkpoint
    said: list[str]  # for the banner: which checkpoints were passed over, what was joined

    @property
    def update(self) -> int:
        return self.since.update


def begin(
    engine: Engine,
    store: CheckpointStore,
    config: Config,
    data_hash: str,
    schedule: Schedule,
    resume: str,
    change: ScheduleChange | None,
) -> Start:
    """Fill the engine. `resume` is one of RESUME_MODES, or names a checkpoint to go on from, by folder or RUN@UPDATE.

    Raises CheckpointError or ScheduleError, the same on every rank, where it may not go on.
    """
    if resume not in RESUME_MODES:
        return _from_named(engine, store, config, data_hash, schedule, resume, change)
    found, rejected = store.newest_valid()
    if found is None:
        _require_fresh_start(store, config, data_hash, resume, rejected)
        if config.run.parent is None:
            first, said = first_weights(config, engine.world)
            engine.load(first, 0)
            return Start("fresh", START, schedule, [[0, 0, config.batch.sequences]], [], None, said)
        found = _parent(store, *config.run.parent)
        return _onward(engine, config, data_hash, schedule, found, "branch")
    if resume == "never":
        raise CheckpointError(f"--resume never: {found.path} is there; use another run.dir, nothing is overwritten")
    _require_same_parent(config, found)
    start = _onward(engine, config, data_hash, schedule, found, change)
    return start._replace(said=[*(f"rejected {text}" for text in rejected), *start.said])


def first_weights(config: Config, world: World) -> tuple[StateSource, list[str]]:
    """What update 0 is filled from, and what the banner says of it."""
    folder = config.run.init_from
    if folder is None:
        return InitialValues(config), []
    weights = open_import(folder, config.model, world)
    return weights, [f"weights of {folder} {read_import(folder)['weights_hash']}"]


def _from_named(
    engine: Engine,
    store: CheckpointStore,
    config: Config,
    data_hash: str,
    schedule: Schedule,
    named: str,
    change: ScheduleChange | None,
) -> Start:
    """Go on from the checkpoint a user named: newer ones of this run are set aside, nothing is deleted."""
    try:
        folder, name = locate(named)
    except LlmtrainError as error:
        raise CheckpointError(
            f"--resume takes auto, must, never, RUN@UPDATE or a checkpoint's folder: {error}"
        ) from None
    there = CheckpointStore(folder, store.world, store.keep)
    own = (there.place.root, type(there.place.fs)) == (store.place.root, type(store.place.fs))
    if not own and store.newest_valid() != (None, []):
        raise CheckpointError(
            f"--resume {named}: {store.place.url} has checkpoints of its own; name one of these, or use another run.dir"
        )
    found = there.require(step_of(name))
    _require_same_parent(config, found)
    start = _onward(engine, config, data_hash, schedule, found, change)
    if own:
        newer = store.supersede(found.step)
        start = start._replace(said=[*(f"set aside {name}.superseded" for name in newer), *start.said])
    return start


def _onward(
    engine: Engine, config: Config, data_hash: str, schedule: Schedule, found: Checkpoint, mode: Mode | None
) -> Start:
    """Fill the engine from a checkpoint, of this run or of the one it branches from."""
    state = found.state
    since = Consumed(state["step"], state["samples"])
    joined = join(config, state, data_hash, schedule, mode, found.path)
    last = last_update(config, joined.schedule, since)
    if last <= since.update and (joined.said or mode == "branch"):
        raise ScheduleError(
            f"{mode}: update {since.update} is made and the run would end with update {last}, so nothing is left to "
            "train: write a longer schedule.horizon, or a run.stop_at to train on at the floor"
        )
    lineage = state["lineage"]
    if mode == "branch":
        assert config.run.parent is not None
        run, step = config.run.parent
        hashes = {key: state[key] for key in ("schedule_hash", "trajectory_hash")}
        lineage = [*lineage, {"run": run, "step": step, **hashes}]
    engine.load(found.reader, since.update)
    how: Literal["branched", "resumed"] = "branched" if mode == "branch" else "resumed"
    return Start(how, since, joined.schedule, joined.segments, lineage, found, joined.said)


def _parent(store: CheckpointStore, run: str, step: int) -> Checkpoint:
    """The checkpoint of another run that `run.branch_from` names; that run's folder is only read."""
    try:
        return CheckpointStore(checkpoints_of(Path(run)), store.world, store.keep).require(step)
    except LlmtrainError as error:
        raise CheckpointError(f"run.branch_from: {error}") from None


def _require_same_parent(config: Config, found: Checkpoint) -> None:
    """Raise where `run.branch_from` is not what the run's own checkpoint was branched from."""
    lineage = found.state["lineage"]
    there = f"{lineage[-1]['run']}@{lineage[-1]['step']}" if lineage else None
    here = None if config.run.parent is None else "{}@{}".format(*config.run.parent)
    if there != here:
        raise CheckpointError(
            f"run.branch_from is {here or 'null'}, but {found.path} "
            + (f"was branched from {there}" if there else "is of a run that was not branched")
            + ": put it back, or use another run.dir for a new branch"
        )


def _require_fresh_start(
    store: CheckpointStore, config: Config, data_hash: str, resume: str, rejected: list[str]
) -> None:
    """Raise where starting over would lose something, or is not what was asked for."""
    why = "".join(f"\n  {text}" for text in rejected)
    if resume == "must":
        raise CheckpointError(f"--resume must: {store.place.url} holds no whole checkpoint{why}")
    if rejected:
        raise CheckpointError(
            f"no checkpoint in {store.place.url} is whole, and starting over would lose the run:{why}\n"
            "Use another run.dir to start over"
        )
    saved = Path(config.run.dir) / "config.yaml"
    if saved.exists():
        there = trajectory_of(load_config(saved), data_hash)
        require_same_trajectory(there, trajectory_of(config, data_hash), config.run.dir)
