"""What checkpoints does a run have, are they whole and its own, and in what do two of them differ?

A checkpoint is named as `RUN@STEP` or by its folder or URL. Tensors are read in ranges, so a model of any size is
compared in the memory of one. Nothing here writes.
"""

import contextlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmtrain.checkpoint.files import PIECE
from llmtrain.checkpoint.flat import EMA, FlatReader
from llmtrain.checkpoint.index import INDEX
from llmtrain.checkpoint.places import MANIFEST, STATE, Place, name_of, step_of
from llmtrain.checkpoint.store import Checkpoint, file_fault, manifest_entries, open_checkpoint
from llmtrain.config import Config, content_hash
from llmtrain.config_file import checkpoints_of, load_config
from llmtrain.data.manifest import load_manifest
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT
from llmtrain.errors import CheckpointError, DataError, LlmtrainError
from llmtrain.schedules import Schedule
from llmtrain.trajectory import trajectory_of


class Row(NamedTuple):
    """One checkpoint, as `llmtrain checkpoint list` shows it; None where its files do not say."""

    name: str
    state: str  # published, unfinished, broken, superseded
    step: int
    tokens: int | None
    lr: float | None
    bytes: int
    ephemeral: bool | None
    saved: str | None  # when, ISO 8601 with its zone
    attempt: int | None
    engine: str | None  # single, fsdp, zero0 to zero3
    ranks: int | None


class Fault(NamedTuple):
    """Something wrong with a run's checkpoints: in which of them (empty: beside them), and what."""

    checkpoint: str
    what: str


class Difference(NamedTuple):
    """One tensor that two checkpoints do not hold alike."""

    name: str
    kind: str
    elements: int  # that differ, by their bits, or in number
    largest: float | None  # absolute difference; None where their numbers differ


def list_checkpoints(run_dir: Path) -> list[Row]:
    """Everything that is or was a checkpoint of a run, newest first. Nothing is hashed. Raises CheckpointError."""
    place = Place(checkpoints_of(run_dir))
    try:
        listing = place.listing()
        states = ("published", "unfinished", "broken", "superseded")
        rows = [_row(place, name, state) for state in states for name in getattr(listing, state)]
    except OSError as error:
        raise CheckpointError(f"{place.url} cannot be read: {error}") from None
    return sorted(rows, key=lambda row: row.step, reverse=True)


def check_run(run_dir: Path, step: int | None, on_hashed: Callable[[int, int], None]) -> tuple[list[str], list[Fault]]:
    """Hash every file of every published checkpoint of a run, or of that of `step`. Returns their names, and faults.

    `on_hashed(done, total)` hears of the bytes. Raises CheckpointError where there is nothing to check.
    """
    place = Place(checkpoints_of(run_dir))
    config = load_config(run_dir / "config.yaml")
    try:
        listing = place.listing()
    except OSError as error:
        raise CheckpointError(f"{place.url} cannot be read: {error}") from None
    names = [name for name in listing.published if step in (None, step_of(name))]
    if not names:
        raise CheckpointError(f"{place.url} holds no checkpoint" + ("" if step is None else f" of update {step}"))
    faults: list[Fault] = []
    whole: dict[int, dict[str, Any]] = {}
    manifests = {name: manifest_entries(place, name) for name in names}
    done, total = 0, sum(int(entry["bytes"]) for entries, _ in manifests.values() for entry in entries)
    for name, (entries, fault) in manifests.items():
        told = [fault] if fault else []
        whole_files = set()
        for entry in entries:
            fault = file_fault(place, name, entry)
            told += [fault] if fault else []
            whole_files |= set() if fault else {entry["file"]}
            done += int(entry["bytes"])
            on_hashed(done, total)
        state = _json(place, f"{name}/{STATE}")
        odd = [] if state is None else _foreign(config, name, state)
        if state is not None and not odd and entries and whole_files <= {INDEX}:  # which runs of one layout share
            told = [f"{MANIFEST} is of another checkpoint: no file is what it says", *told]
        faults += [Fault(name, text) for text in [*told, *odd]]
        if state is not None and not told and not odd:
            whole[step_of(name)] = state
    faults += _unlike_the_next(whole)
    if step is None and listing.latest not in (None, names[0]):
        faults.append(Fault("", f'latest is stale: it names "{listing.latest}", the newest is {names[0]}'))
    return names, faults


def open_named(text: str) -> Checkpoint:
    """The checkpoint that RUN@STEP or a folder or URL names, without hashing it. Raises LlmtrainError."""
    folder, name = locate(text)
    return open_checkpoint(Place(folder), name)


def locate(text: str) -> tuple[str, str]:
    """Where the checkpoint lies that RUN@STEP or a folder or URL names, and its name there. Raises LlmtrainError."""
    folder, _, name = text.rstrip("/").rpartition("/")
    if name == name_of(step_of(name)):
        return folder or ".", name
    run, at, step = text.rpartition("@")
    if not at or not step.isdigit():
        raise CheckpointError(f"{text}: write RUN@STEP, or the folder of a checkpoint, .../{name_of(1000)}")
    return checkpoints_of(Path(run)), name_of(int(step))


def diff(a: Checkpoint, b: Checkpoint) -> tuple[list[tuple[str, Any, Any]], list[Difference]]:
    """How `b` differs from `a`: values of state.json by dotted name, ranks whose generators differ, and tensors."""
    rows = differences(a.state, b.state)
    if len(a.reader.files) == len(b.reader.files):
        for rank in range(len(a.reader.files)):
            one, other = a.reader.metadata(rank), b.reader.metadata(rank)
            odd = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
            rows += [(f"rank {rank}, {key}", content_hash(one.get(key)), content_hash(other.get(key))) for key in odd]
    names = sorted(a.reader.names() | b.reader.names())
    kinds = (WEIGHT, EXP_AVG, EXP_AVG_SQ, EMA)
    tensors = [_compare(a.reader, b.reader, name, kind) for name in names for kind in kinds]
    return rows, [tensor for tensor in tensors if tensor.elements]


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every leaf that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [row for key in keys for row in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [(name, old, new)]


def _row(place: Place, name: str, kind: str) -> Row:
    state = _json(place, f"{name}/{STATE}") or {}
    manifest = _json(place, f"{name}/{MANIFEST}") or {}
    engine = state.get("engine", {})
    step = step_of(name)
    on = f"zero{engine['zero_stage']}" if engine.get("kind") == "deepspeed" else engine.get("kind")
    return Row(
        name=name,
        state=kind,
        step=step,
        tokens=state.get("tokens"),
        lr=Schedule.from_spec(state["schedule"]).lr(step) if "schedule" in state else None,
        bytes=place.fs.du(f"{place.root}/{name}"),
        ephemeral=manifest.get("ephemeral"),
        saved=_when(place, f"{name}/{STATE}"),
        attempt=state.get("attempt"),
        engine=on,
        ranks=engine.get("ranks"),
    )


def _when(place: Place, file: str) -> str | None:
    """When a file was written, where the store tells."""
    with contextlib.suppress(OSError, NotImplementedError, KeyError):
        return str(place.fs.modified(f"{place.root}/{file}").isoformat(timespec="seconds"))
    return None


def _json(place: Place, file: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(place.read(file))
        return found if isinstance(found, dict) else None
    return None


def _foreign(config: Config, name: str, state: dict[str, Any]) -> list[str]:
    """What in a state.json is not of this run's checkpoint of that name."""
    if state.get("step") != step_of(name):
        return [f"{STATE} is of update {state.get('step')}"]
    there = state.get("trajectory")
    if not isinstance(there, dict):
        return [f"{STATE} has no trajectory"]
    rows = differences({**there, "batch_segments": None}, {**_own_trajectory(config, there), "batch_segments": None})
    rows = [row for row in rows if row[0] != "batch.sequences"]  # may change on the way
    if not rows:
        return []
    told = "; ".join(f"{field} is {old!r}, in this run {new!r}" for field, old, new in rows)
    return [f"{STATE} is of another run: {told}"]


def _own_trajectory(config: Config, there: dict[str, Any]) -> dict[str, Any]:
    """What shapes this run's loss. Data and imported weights that are not on this machine are taken as `there`."""
    try:
        data_hash = load_manifest(config.data.path).content_hash
    except DataError:
        data_hash = there.get("data", "")
    try:
        return trajectory_of(config, data_hash)
    except LlmtrainError:
        bare = config.model_copy(update={"run": config.run.model_copy(update={"init_from": None})})
        return {"init_from": there.get("init_from"), **trajectory_of(bare, data_hash)}


def _unlike_the_next(states: dict[int, dict[str, Any]]) -> list[Fault]:
    """Checkpoints whose learning rate or batches are not what a newer one says they were: one is of another run."""
    faults = []
    steps = sorted(states)
    for step, newer in pairwise(steps):
        older, later = states[step], states[newer]
        here, there = (Schedule.from_spec(state["schedule"]).lr(step) for state in (older, later))
        segments = older["trajectory"]["batch_segments"]
        if abs(here - there) > 1e-9 * abs(there):
            what = f"its learning rate is {here:.9g}, {name_of(newer)} says it was {there:.9g}"
        elif segments != later["trajectory"]["batch_segments"][: len(segments)]:
            what = f"its batches are not those that {name_of(newer)} went on from"
        else:
            continue
        faults.append(Fault(name_of(step), f"{what}: one of the two is of another run"))
    return faults


def _compare(a: FlatReader, b: FlatReader, name: str, kind: str) -> Difference:
    """Element by element, a piece at a time."""
    numel = a.numel(name, kind)
    if numel != b.numel(name, kind):
        return Difference(name, kind, abs(numel - b.numel(name, kind)), None)
    odd, largest = 0, 0.0
    for start in range(0, numel, PIECE):
        one, other = (reader.read(name, kind, start, min(numel, start + PIECE)).numpy() for reader in (a, b))
        unlike = one.view(np.int32) != other.view(np.int32)
        if unlike.any():
            odd += int(unlike.sum())
            largest = max(largest, float(np.abs(other[unlike].astype(np.float64) - one[unlike]).max()))
    return Difference(name, kind, odd, largest)
