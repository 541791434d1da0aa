"""From what does a run start: fresh initial values, or the newest checkpoint it may go on from?

A checkpoint is resumed only where what shaped the loss (the trajectory) is the same, and the schedule too. Everything
else may change: the engine, the number of ranks, the micro-batch, when to validate.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.engines.base import WEIGHT, Engine
from llmtrain.errors import CheckpointError, ScheduleError
from llmtrain.model.initial import initial_slice
from llmtrain.schedules import Schedule, continues, refusal

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
    """Where training begins."""

    update: int  # updates already made
    state: dict[str, Any]  # state.json of the checkpoint; empty on a fresh start
    path: Path | None
    rejected: list[str]  # newer checkpoints that are not whole, and why


def begin(
    engine: Engine, store: CheckpointStore, config: Config, facts: dict[str, Any], schedule: Schedule, resume: Resume
) -> Start:
    """Fill the engine. Raises CheckpointError, the same on every rank, where the run folder forbids `resume`."""
    found, rejected = store.newest_valid()
    if found is None:
        _require_fresh_start(store, config, facts, resume, rejected)
        engine.load(InitialValues(config), 0)
        return Start(0, {}, None, [])
    if resume == "never":
        raise CheckpointError(
            f"--resume never: {config.run.dir} holds {found.path.name}; use another run.dir, nothing is overwritten"
        )
    rows = differences(found.state["trajectory"], facts["trajectory"])
    if rows:
        raise CheckpointError(
            f"{found.path} belongs to another run:\n{_table(rows)}\nPut the values back, or use another run.dir"
        )
    saved = Schedule.from_spec(found.state["schedule"])
    if not continues(saved, schedule):
        raise ScheduleError(f"{found.path}: {refusal(saved, schedule, found.state['step'])}")
    engine.load(found.reader, found.state["step"])
    return Start(found.state["step"], found.state, found.path, rejected)


def _require_fresh_start(
    store: CheckpointStore, config: Config, facts: dict[str, Any], resume: Resume, rejected: list[str]
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
        rows = differences(load_config(saved).trajectory(facts["trajectory"]["data"]), facts["trajectory"])
        if rows:
            raise CheckpointError(f"{config.run.dir} belongs to another run:\n{_table(rows)}\nUse another run.dir")


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every leaf that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [row for key in keys for row in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [(name, old, new)]


def _table(rows: list[tuple[str, Any, Any]]) -> str:
    return "\n".join(f"  {name}: there {old!r}, in this config {new!r}" for name, old, new in rows)
