"""From what does a run start: fresh initial values, or the newest checkpoint it may go on from?

A checkpoint is resumed only where what shaped the loss (the trajectory) is the same, and the schedule too. Everything else may
change: the engine, the number of ranks, the micro-batch, when to validate.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llmtrain.checkpoint.store import Checkpoint, CheckpointStore
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.engines.base import WEIGHT, Engine
from llmtrain.errors import CheckpointError
from llmtrain.model.initial import initial_slice

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


def begin(engine: Engine, store: CheckpointStore, config: Config, facts: dict[str, Any], resume: Resume) -> Start:
    """Fill the engine. Raises CheckpointError, the same on every rank, where the run folder forbids `resume`."""
    found, rejected = store.newest_valid()
    if found is None:
        if resume == "must":
            raise CheckpointError(
                f"--resume must: {store.folder} holds no whole checkpoint" + "".join(f"\n  {text}" for text in rejected)
            )
        if rejected:
            raise CheckpointError(
                f"no checkpoint in {store.folder} is whole, and starting over would lose the run:"
                + "".join(f"\n  {text}" for text in rejected)
                + "\nUse another run.dir to start over"
            )
        refuse_other_run(Path(config.run.dir), config, facts)
        engine.load(InitialValues(config), 0)
        return Start(0, {}, None, [])
    if resume == "never":
        raise CheckpointError(
            f"--resume never: {config.run.dir} holds {found.path.name}; use another run.dir, nothing is overwritten"
        )
    refuse_difference(found, facts)
    engine.load(found.reader, found.state["step"])
    return Start(found.state["step"], found.state, found.path, rejected)


def refuse_difference(found: Checkpoint, facts: dict[str, Any]) -> None:
    """Raise CheckpointError with every field in which the checkpoint's run is not this run."""
    for what, remedy in (
        ("trajectory", "Put the values back, or start a new run in another run.dir"),
        ("schedule", "Put the values back, or start a new run in another run.dir"),
    ):
        if found.state[f"{what}_hash"] == facts[f"{what}_hash"]:
            continue
        rows = differences(found.state[what], facts[what])
        table = "\n".join(f"  {name}: checkpoint {old!r}, config {new!r}" for name, old, new in rows)
        raise CheckpointError(f"{found.path} has another {what} than this config:\n{table}\n{remedy}")


def refuse_other_run(run_dir: Path, config: Config, facts: dict[str, Any]) -> None:
    """Raise CheckpointError where the folder belongs to a run that differs and never reached a checkpoint."""
    saved = run_dir / "config.yaml"
    if not saved.exists():
        return
    old = load_config(saved).trajectory(facts["trajectory"]["data"])
    rows = differences(old, facts["trajectory"])
    if rows:
        table = "\n".join(f"  {name}: there {before!r}, here {after!r}" for name, before, after in rows)
        raise CheckpointError(f"{run_dir} belongs to another run:\n{table}\nUse another run.dir")


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every leaf that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [row for key in keys for row in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [(name, old, new)]
