"""From what does a run start: fresh initial values, a checkpoint of another run, or the newest one of its own?

A checkpoint is gone on from only where what shaped the loss is the same; the schedule and the global batch may change
where the user says how (`llmtrain.train.join`). Everything else may change freely: the engine, the number of ranks, the
micro-batch, when to validate.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llmtrain.checkpoint.store import Checkpoint, CheckpointStore, open_checkpoint
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.data.order import START, Consumed
from llmtrain.engines.base import WEIGHT, Engine
from llmtrain.errors import CheckpointError, ScheduleError
from llmtrain.model.initial import initial_slice
from llmtrain.schedules import Schedule
from llmtrain.train.join import Mode, ScheduleChange, Segments, join, last_update, require_same_trajectory

Resume = Literal["auto", "must", "never"]


class InitialValues:
    """Update 0 as a source of state: weights by (seed, name), zero moments."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32."""
        if kind != WEIGHT:
            return torch.zeros(stop - start)
        return torch.from_numpy(initial_slice(self.config.model, name, start, stop, self.config.run.seed))


class Start(NamedTuple):
    """Where training begins, and what it goes on with."""

    how: Literal["fresh", "branched", "resumed"]
    since: Consumed  # updates already made, samples already consumed
    schedule: Schedule  # of the whole run, with every join
    segments: Segments  # the global batches of the whole run
    lineage: list[dict[str, Any]]  # the checkpoints of other runs that this one goes back to, the oldest first
    path: Path | None  # the checkpoint
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
    resume: Resume,
    change: ScheduleChange | None,
) -> Start:
    """Fill the engine. Raises CheckpointError or ScheduleError, the same on every rank, where it may not go on."""
    found, rejected = store.newest_valid()
    if found is None:
        _require_fresh_start(store, config, data_hash, resume, rejected)
        if config.run.parent is None:
            engine.load(InitialValues(config), 0)
            return Start("fresh", START, schedule, [[0, 0, config.batch.sequences]], [], None, [])
        found = _parent(store, *config.run.parent)
        return _onward(engine, config, data_hash, schedule, found, "branch")
    if resume == "never":
        raise CheckpointError(
            f"--resume never: {config.run.dir} holds {found.path.name}; use another run.dir, nothing is overwritten"
        )
    _require_same_parent(config, found)
    start = _onward(engine, config, data_hash, schedule, found, change)
    return start._replace(said=[*(f"rejected {text}" for text in rejected), *start.said])


def _onward(
    engine: Engine, config: Config, data_hash: str, schedule: Schedule, found: Checkpoint, mode: Mode | None
) -> Start:
    """Fill the engine from a checkpoint, of this run or of the one it branches from."""
    state = found.state
    since = Consumed(state["step"], state["samples"])
    joined = join(config, state, data_hash, schedule, mode, str(found.path))
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
    return Start(how, since, joined.schedule, joined.segments, lineage, found.path, joined.said)


def _parent(store: CheckpointStore, run: str, step: int) -> Checkpoint:
    """The checkpoint of another run that `run.branch_from` names; that run's folder is only read."""
    folder = Path(run) / "checkpoints"
    path = folder / f"step_{step:08d}"
    fault = CheckpointStore(folder, store.world, store.keep).fault(path)
    if fault:
        held = sorted(int(found.name[5:]) for found in folder.glob("step_*") if found.name[5:].isdigit())
        raise CheckpointError(
            f"run.branch_from: {path}: {fault}; {run} holds the checkpoints of "
            + (f"updates {', '.join(map(str, held))}" if held else "no update")
        )
    return open_checkpoint(path)


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
    store: CheckpointStore, config: Config, data_hash: str, resume: Resume, rejected: list[str]
) -> None:
    """Raise where starting over would lose something, or is not what was asked for."""
    why = "".join(f"\n  {text}" for text in rejected)
    if resume == "must":
        raise CheckpointError(f"--resume must: {store.folder} holds no whole checkpoint{why}")
    if rejected:
        raise CheckpointError(
            f"no checkpoint in {store.folder} is whole, and starting over would lose the run:{why}\n"
            "Use another run.dir to start over"
        )
    saved = Path(config.run.dir) / "config.yaml"
    if saved.exists():
        there = load_config(saved).trajectory(data_hash)
        require_same_trajectory(there, config.trajectory(data_hash), config.run.dir)
