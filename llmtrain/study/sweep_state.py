"""Where does each run of a study stand, may it go on, and is there what it needs?

The run folder alone says it: a run is finished where its last update is both validated and saved, so what was killed
between the two is trained to its end again. `STUDY/study.json` names the runs, for whoever compares them.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmtrain.checkpoint.places import Place, name_of
from llmtrain.config import Config
from llmtrain.config_file import load_config, to_yaml
from llmtrain.data.dataset import open_data
from llmtrain.errors import CheckpointError, ConfigError, EnvironmentError
from llmtrain.model.size import parameter_count
from llmtrain.study.record import STUDY_FILE
from llmtrain.study.sweep_file import Planned, Run
from llmtrain.train.metrics import METRICS_FILE

State = Literal["new", "begun", "finished"]

_TAIL_BYTES = 1 << 16
_BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weights and two moments
_TOLD = 6  # contradictions


class Rows(NamedTuple):
    """The last update and the last validation among the last rows of a run."""

    step: dict[str, Any] | None
    validation: dict[str, Any] | None


def last_rows(run_dir: Path) -> Rows:
    """Read the end of `metrics.jsonl`, as cheap for a long run as for a short one."""
    try:
        with (run_dir / METRICS_FILE).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return Rows(None, None)
    found: dict[str, dict[str, Any]] = {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # the ends of what was read may be torn
            row = json.loads(line)
            if isinstance(row, dict) and (row.get("kind") == "step" or row.get("set") == "validation"):
                found.setdefault(row["kind"], row)
        if len(found) == 2:
            break
    return Rows(found.get("step"), found.get("validation"))


def state_of(run: Run) -> State:
    """Where a run stands. Raises EnvironmentError where its checkpoints cannot be looked at."""
    rows = last_rows(run.folder)
    if rows.validation is None and rows.step is None:
        return "new"
    if rows.validation is None or rows.validation["step"] != run.updates:
        return "begun"
    try:
        return "finished" if Place(run.config.checkpoint_url).taken(name_of(run.updates)) else "begun"
    except (OSError, CheckpointError) as error:
        raise EnvironmentError(f"{run.config.checkpoint_url} cannot be read: {error}") from None


def check_study(planned: Planned, states: Sequence[State], at_once: int) -> None:
    """Raise LlmtrainError where a run would contradict what its folder holds, or data or room is missing."""
    _require_same_study(planned)
    _require_same_configs(planned, states)
    if all(state == "finished" for state in states):
        return
    config = planned.runs[0].config
    data = open_data(config.data.path, planned.prepare_command)
    data.manifest.require_fits(config.model.vocab_size)
    data.num_samples(config.batch.seq_len)
    for path in config.validation.sets.values():
        open_data(path, f"llmtrain prepare --config ... --set data.path={path}")
    left = [run for run, state in zip(planned.runs, states, strict=True) if state != "finished"]
    _require_room(planned.study.folder, left, at_once)


def write_study(planned: Planned) -> None:
    """Write `study.json`: the runs by name, and which of them are the baseline."""
    values = {
        "name": planned.study.name,
        "baseline": [run.name for run in planned.runs if run.cell == planned.baseline],
        "runs": [run.name for run in planned.runs],
    }
    _write(planned.study.folder / STUDY_FILE, json.dumps(values, indent=1) + "\n")


def write_config(run: Run) -> Path:
    """Write the config that a run is started with, where it is not there yet. Returns its path."""
    path, text = run.folder / "config.yaml", to_yaml(run.config)
    if not path.is_file() or path.read_text(errors="replace") != text:
        _write(path, text)
    return path


@contextmanager
def hold_study(folder: Path, *, shared: bool) -> Iterator[int]:
    """Hold `STUDY/lock` and yield its descriptor. Trainings that inherit it keep the study held when this process dies.

    `shared`: beside others that share it, as single runs of a study do. Raises CheckpointError where it is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CheckpointError(
            f"{folder} is being swept: another `llmtrain sweep` of this study runs, or a training that one started; "
            "wait for it, or end it"
        ) from None
    except OSError:  # a file system without such locks: each run has a lock of its own
        pass
    try:
        yield handle
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text)
    draft.replace(path)


def _require_same_study(planned: Planned) -> None:
    folder = planned.study.folder
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / STUDY_FILE).read_bytes())
        if found["name"] != planned.study.name:
            raise ConfigError(
                f'{folder} holds the study "{found["name"]}", this one is "{planned.study.name}": write another `dir`'
            )


def _require_same_configs(planned: Planned, states: Sequence[State]) -> None:
    """Raise where a run was begun with another config than the study asks for now."""
    lines = []
    for run, state in zip(planned.runs, states, strict=True):
        if state == "new":
            continue
        try:
            there = load_config(run.folder / "config.yaml")
        except ConfigError:  # cut off when a process was killed: it is written anew
            continue
        before, now = _flat(_shaping(there)), _flat(_shaping(run.config))
        lines += [
            f"\n  {run.name}: {key} was {before.get(key, 'not set')}, is {now.get(key, 'not set')}"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key)
        ]
    if lines:
        more = f"\n  and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
        raise ConfigError(
            f"the study contradicts runs that are in {planned.study.folder}:{''.join(lines[:_TOLD])}{more}\n"
            "Put it back, give the changed study another `name` or `dir`, or delete these run folders"
        )


def _shaping(config: Config) -> dict[str, Any]:
    """What may not change between two starts of a run: all that a report could show."""
    values = config.model_dump(mode="json", exclude={"logging": True, "checkpoint": True})
    for key in ("dir", "max_minutes"):
        del values["run"][key]
    return values


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value})
    return found


def _require_room(folder: Path, runs: Sequence[Run], at_once: int) -> None:
    """Raise EnvironmentError where the disk has no room for the checkpoints of these runs."""
    local = [run for run in runs if not run.config.checkpoint.dir]
    if not local:
        return
    size = _BYTES_PER_PARAMETER * parameter_count(local[0].config.model)
    needed = size * (sum(_kept(run) for run in local) + at_once)
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise EnvironmentError(
            f"{place} has {free / 1e9:.1f} GB free, the checkpoints of {len(local)} runs need {needed / 1e9:.1f} GB: "
            "lower checkpoint.keep or checkpoint.every in the study's `set`, or write another `dir`"
        )


def _kept(run: Run) -> int:
    """Checkpoints that a run has at its end, one that is being replaced included."""
    checkpoint = run.config.checkpoint
    often = 1 + sum(run.updates // run.config.updates(every) for every in [checkpoint.every] if every is not None)
    forever = 0 if checkpoint.keep_every is None else run.updates // run.config.updates(checkpoint.keep_every)
    return min(often, checkpoint.keep + forever)
