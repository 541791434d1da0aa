"""How does a run go on from a checkpoint of another?

A branch is a run of its own, with the trunk's data order, seed, batch and model, on another schedule
(`llmtrain.study.branch_cooldown`). The trunk's folder is only read.
"""

import json
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.places import STATE, Place, name_of, step_of
from llmtrain.config import Config
from llmtrain.config_file import apply_override, checkpoints_of, load_config, to_yaml, validate
from llmtrain.device import usable_cores
from llmtrain.errors import CheckpointError, ConfigError, EnvironmentError, ScheduleError
from llmtrain.schedules import Schedule, diff, plan, replace
from llmtrain.study.branch_cooldown import Parent
from llmtrain.study.launch import start_training
from llmtrain.trajectory import trajectory_of

_NAMED = 6  # checkpoints or fields that a message names
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_S = 0.5  # from one look for a signal to the next
_TOLD = 20  # lines of a log


@dataclass(frozen=True)
class Trunk:
    """A run to branch from, or the config of one that is still to be trained."""

    run: str
    config: Config
    place: Place

    @cached_property
    def saved(self) -> list[int]:
        """The updates it has checkpoints of, rising. Raises CheckpointError where they cannot be listed."""
        try:
            return sorted(step_of(name) for name in self.place.listing().published)
        except OSError as error:
            raise CheckpointError(f"{self.place.url} cannot be read: {error}") from None

    @cached_property
    def planned(self) -> Schedule:
        """The schedule that its config describes."""
        return plan(self.config.schedule, self.config.batch.tokens, self.config.optim.betas[1])

    @cached_property
    def known(self) -> Schedule:
        """The schedule that its newest checkpoint was trained on; the planned one where there is none."""
        return self.after(self.saved[-1]).before if self.saved else self.planned

    def after(self, step: int) -> Parent:
        """The trunk as its checkpoint of `step` says it is. Raises CheckpointError, with the nearest, without one."""
        if step not in self.saved:
            near = sorted(sorted(self.saved, key=lambda there: abs(there - step))[:_NAMED])
            there = f"; the nearest are {', '.join(map(str, near))}" if near else ", nor of any other"
            raise CheckpointError(f"{self.run} has no checkpoint of update {step}{there}")
        try:
            state = json.loads(self.place.read(f"{name_of(step)}/{STATE}"))
            _ = self.planned  # runs the user's schedule.module, whose shapes the checkpoint may name
            before = Schedule.from_spec(state["schedule"])
            batch = state["trajectory"]["batch_segments"][-1][2]
            return Parent(self.run, step, self.config, before, batch, state["trajectory"], state["engine"]["ranks"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{self.place.where(name_of(step))}: {STATE} cannot be read ({error!r}); "
                f"llmtrain checkpoint check {self.run}"
            ) from None

    def expected_after(self, step: int) -> Parent:
        """The trunk as it will be after `step`, whether it is trained so far or not."""
        return Parent(self.run, step, self.config, self.known, self.config.batch.sequences, None, 1)


@dataclass(frozen=True)
class Branch:
    """A run that goes on from another."""

    parent: Parent
    config: Config
    schedule: Schedule  # the trunk's through `parent.step`, its own after it

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def last(self) -> int:
        """The update it ends with."""
        return self.schedule.total_updates if self.config.run.stop_at is None else self.config.last_update

    @property
    def commands(self) -> list[str]:
        """What starts it, on as many ranks as the trunk had."""
        if self.parent.ranks == 1:
            return [f"llmtrain train --config {self.config_file}"]
        starter = {"deepspeed": "deepspeed --num_gpus", "fsdp": "torchrun --nproc-per-node"}[self.config.engine.kind]
        return [f"{starter} {self.parent.ranks} launch/pretrain.py --config {self.config_file}"]


def open_trunk(path: Path) -> Trunk:
    """The run in a folder, or the one that a config file describes. Raises ConfigError where it is neither."""
    if path.is_file():
        config = load_config(path)
        return Trunk(config.run.dir, config, Place(config.checkpoint_url))
    url = checkpoints_of(path)
    return Trunk(str(path), load_config(path / "config.yaml"), Place(url))


def branch(parent: Parent, schedule: dict[str, Any], name: str, folder: Path, overrides: Sequence[str] = ()) -> Branch:
    """The branch with this `schedule` section, called `name`, in `folder`; nothing is written. Raises LlmtrainError."""
    config = parent.config
    values = config.model_dump(mode="json")
    values["run"] |= {"name": name, "dir": str(folder), "branch_from": f"{parent.run}@{parent.step}", "stop_at": None}
    values["schedule"] = schedule
    values["checkpoint"]["keep_every"] = None  # that is how a trunk keeps what is branched from
    if parent.batch != config.batch.sequences:
        values["batch"] |= {"global_tokens": None, "global_sequences": parent.batch}
    if config.checkpoint.dir:
        above, slash, _ = config.checkpoint.dir.rstrip("/").rpartition("/")
        values["checkpoint"]["dir"] = f"{above}{slash}{name}"
    for text in overrides:
        apply_override(values, text)
    own = validate(values, f"the branch {name}")
    _require_same_trajectory(parent, own)
    planned = plan(own.schedule, own.batch.tokens, own.optim.betas[1])
    found = Branch(parent, own, replace(parent.before, parent.step, planned))
    if found.last <= parent.step:
        raise ScheduleError(
            f"{name} would end with update {found.last}, and {parent.run} made {parent.step} already: write a longer "
            "schedule.horizon"
        )
    return found


def write(wanted: Branch) -> bool:
    """Write the branch's config into its folder; False where just that is there. Raises ConfigError where other is."""
    file, folder = wanted.config_file, wanted.folder
    remedy = "choose another --name, or --dir"
    try:
        if file.is_file():
            there = load_config(file)
            if to_yaml(there) == to_yaml(wanted.config):
                return False
            fields = [row.field for row in diff(there.model_dump(mode="json"), wanted.config.model_dump(mode="json"))]
            raise ConfigError(f"{folder} is another run, it differs in {', '.join(fields[:_NAMED])}: {remedy}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there already, and is no run: {remedy}")
        place = Place(wanted.config.checkpoint_url)
        if place.listing().published:
            raise ConfigError(f"checkpoint.dir {place.url} holds checkpoints already: {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(wanted.config))
    except OSError as error:
        raise EnvironmentError(f"cannot write {file}: {error.strerror or error}") from None
    return True


def _require_same_trajectory(parent: Parent, own: Config) -> None:
    """Raise ConfigError where `--set` changes what a branch takes from its trunk."""
    if parent.trajectory is None:
        return
    there = {**parent.trajectory, "batch_segments": None}
    there["batch"] = {**there["batch"], "sequences": parent.batch}
    changes = diff(there, {**trajectory_of(own, there["data"]), "batch_segments": None})
    if changes:
        rows = "\n".join(f"  {row.field}: there {row.old!r}, in the branch {row.new!r}" for row in changes)
        raise ConfigError(f"{parent.run}@{parent.step} shaped its loss otherwise:\n{rows}\nA branch changes none of it")


def train_here(wanted: Branch) -> str:
    """Train a branch that is written to its end, in a process of one rank, its output in RUN/train.log.

    Returns the name of the signal that told this process to stop, after the branch was saved; else ''. Raises
    EnvironmentError, with the end of the log, where training fails.
    """
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in _SIGNALS}
    log = wanted.folder / "train.log"
    try:
        process = start_training(wanted.config_file, usable_cores(), log)
        code = None
        while code is None:
            try:
                code = process.wait(timeout=_LOOK_S)
            except subprocess.TimeoutExpired:
                if heard:
                    process.terminate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-_TOLD:])
        raise EnvironmentError(f"training {wanted.folder} ended with exit code {code}; the end of {log}:\n{end}")
    return signal.Signals(heard[0]).name if heard else ""
