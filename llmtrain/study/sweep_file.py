"""Which runs does a study file ask for?

A study is a grid of schedules, warm-ups, peaks and seeds. What the grid does not name comes from the base config, with
`set` laid over it. A cell is a schedule with its warm-up; a run is a cell at one peak with one seed. The name of a run
says these four and nothing of the rest of the grid, so the runs of a grid that grows keep their folders. Runs are
counted from 1, seed by seed, so that a study that was stopped has something of every cell.
"""

import copy
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from llmtrain.config import Config, ScheduleConfig, Section, content_hash
from llmtrain.config_file import apply_override, read_mapping, read_section, validate
from llmtrain.errors import ConfigError, LlmtrainError, ScheduleError, did_you_mean
from llmtrain.schedules import Schedule, plan
from llmtrain.schedules.registry import load_module, shape_named
from llmtrain.schedules.summary import convex_bound
from llmtrain.units import Length

_LONGEST_LABEL = 60  # characters
_TOLD = 6  # runs that a fault names


class AutoPeaks(Section):
    """Peaks a factor 2 apart around the one that the convex bound favours for a shape, given a good one for another.

    The centre is rounded to a whole number of doublings of the reference's peak, so that schedules share peaks.
    """

    points: int = Field(5, ge=3, description="peaks of each schedule")
    reference: dict[str, Any] = Field({}, description="a schedule and its peak, written like those of the grid")


def _read_peaks(value: Any) -> Any:
    if value == "auto":
        return {}
    if not isinstance(value, list | dict):
        raise ValueError(f"{value!r} is no choice of peaks: write [7.5e-4, 1.5e-3, 3e-3], auto or {{points: 7}}")
    return value


Peaks = Annotated[
    Annotated[list[PositiveFloat], Field(min_length=1), Tag("list[float]")] | Annotated[AutoPeaks, Tag("AutoPeaks")],
    Discriminator(lambda value: "list[float]" if isinstance(value, list) else "AutoPeaks"),
    BeforeValidator(_read_peaks),
]


class Grid(Section):
    """Every combination of these is run. An axis that is not written is as in the base config."""

    schedules: list[dict[str, Any]] = Field([{}], min_length=1, description="what differs from the base's schedule")
    warmups: list[Length] | None = Field(None, min_length=1, description='"0 steps": none')
    peaks: Peaks | None = None
    seeds: list[NonNegativeInt] | None = Field(None, min_length=1)


class Study(Section):
    """One study file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, dot, dash, underscore")
    base: str = Field(description="a config, its path counted from the study file's folder")
    dir: str = Field("", description="folder of the run folders; runs/<name> when empty")
    set: dict[str, Any] = Field({}, description="sections laid over the base config")
    grid: Grid
    baseline: str | None = Field(None, description="the cell that others are compared with; the first when null")
    at_once: PositiveInt = Field(1, description="runs that train at the same time")

    @property
    def folder(self) -> Path:
        return Path(self.dir or f"runs/{self.name}")


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    index: int  # from 1
    name: str
    cell: str
    config: Config
    schedule: Schedule

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def updates(self) -> int:
        """The update it ends with."""
        return self.config.last_update

    @property
    def tokens(self) -> int:
        return self.updates * self.config.batch.tokens

    @property
    def area(self) -> float:
        """The sum of the learning rates it will use."""
        return self.schedule.peak * float(self.schedule.multipliers(np.arange(1, self.updates + 1)).sum())


@dataclass(frozen=True)
class Planned:
    """A study and all its runs."""

    study: Study
    runs: list[Run]
    baseline: str  # a cell
    prepare_command: str  # makes the data that all runs share


@dataclass(frozen=True)
class _Place:
    """One point of the grid."""

    cell: str
    name: str
    schedule: dict[str, Any]
    seed: int


def read_study(path: Path, overrides: list[str] | None = None) -> Study:
    """Read the study file and apply `a.b=value` overrides. Raises ConfigError naming every fault."""
    values = read_mapping(path, "study", Study)
    for override in overrides or []:
        apply_override(values, override)
    return read_section(Study, values, f"study {path}")


def plan_study(path: Path, overrides: list[str] | None = None) -> Planned:
    """Every run of a study file, its config and schedule checked. Raises ConfigError and ScheduleError."""
    study = read_study(path, overrides)
    base_path = path.parent / study.base
    values = _laid_over(read_mapping(base_path, "base config", Config), study.set)
    base = validate(copy.deepcopy(values), f"study {path}: {base_path} with `set`")
    try:
        places = list(_places(study.grid, base))
    except (ConfigError, ScheduleError) as error:
        raise ConfigError(f"study {path}: {error}") from None
    runs = _checked(study, path, values, places)
    _require_different(path, runs)
    cells = list(dict.fromkeys(run.cell for run in runs))
    if study.baseline is not None and study.baseline not in cells:
        hint = did_you_mean(study.baseline, cells)
        raise ConfigError(f'study {path}: baseline "{study.baseline}" is no cell of it{hint}')
    extra = [f" --set {shlex.quote(text)}" for text in _as_overrides(study.set) if text.startswith(("data.", "model."))]
    return Planned(study, runs, study.baseline or cells[0], f"llmtrain prepare --config {base_path}{''.join(extra)}")


def _laid_over(values: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `above` in their place, mappings key by key."""
    merged = dict(values)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def _as_overrides(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """The leaves of nested sections as `a.b=value`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _as_overrides(value, f"{before}{key}.")
        else:
            yield f"{before}{key}={value if isinstance(value, str) else json.dumps(value)}"


def _places(grid: Grid, base: Config) -> Iterator[_Place]:
    """The points of the grid in the order of its runs."""
    cells = [
        (f"{_label(entry, base)}-w{_slug(warmup)}", schedule)
        for entry in grid.schedules
        for warmup, schedule in _with_warmups(entry, grid, base)
    ]
    peaks = [_peaks_of(schedule, grid.peaks, base) for _, schedule in cells]
    for seed in grid.seeds if grid.seeds is not None else [base.run.seed]:
        for (cell, schedule), own in zip(cells, peaks, strict=True):
            for peak in own:
                yield _Place(cell, f"{cell}-p{_slug(f'{peak:g}')}-s{seed}", {**schedule, "peak": peak}, seed)


def _with_warmups(entry: dict[str, Any], grid: Grid, base: Config) -> Iterator[tuple[Length, dict[str, Any]]]:
    """The schedule of an entry at every warm-up."""
    for key, axis in (("warmup", grid.warmups), ("peak", grid.peaks)):
        if key in entry and axis is not None:
            raise ConfigError(f"grid.schedules: {entry} has a {key} of its own; leave it out, or grid.{key}s")
    schedule = _schedule(entry, base)
    try:
        written = [Length.parse(schedule.get("warmup", "0 steps"))]
    except ValueError as error:
        raise ConfigError(f"grid.schedules: warmup: {error}") from None
    for warmup in written if grid.warmups is None else grid.warmups:
        yield warmup, {**schedule, "warmup": str(warmup)}


def _schedule(entry: dict[str, Any], base: Config) -> dict[str, Any]:
    """A schedule block: what the entry says, and of the base's what does not belong to another shape alone."""
    block = base.schedule.model_dump(mode="json")
    name = entry.get("name", block["name"])
    if "module" in entry or "module" in block:
        load_module(str(entry.get("module", block.get("module"))))
    if name != block["name"]:
        foreign = shape_named(block["name"]).parameters
        block = {key: value for key, value in block.items() if key not in foreign}
    return {**block, **entry}


def _peaks_of(schedule: dict[str, Any], peaks: list[float] | AutoPeaks | None, base: Config) -> list[float]:
    if isinstance(peaks, list):
        return peaks
    if peaks is None:
        return [schedule["peak"]]
    reference = _schedule(peaks.reference, base)
    ratio = _favoured(schedule, "grid.schedules", base) / _favoured(reference, "grid.peaks.reference", base)
    centre = reference["peak"] * 2.0 ** round(math.log2(ratio))
    return [centre * 2.0**doublings for doublings in range(-(peaks.points // 2), peaks.points - peaks.points // 2)]


def _favoured(schedule: dict[str, Any], where: str, base: Config) -> float:
    """The peak that the convex bound favours for a shape, in units that are the same for all shapes."""
    config = read_section(ScheduleConfig, schedule, where)
    planned = plan(config, base.batch.tokens, base.optim.betas[1])
    _, peak = convex_bound(planned.multipliers(np.arange(1, base.last_update + 1)))
    if not 0 < peak < math.inf:
        raise ConfigError(f"{where}: {config.name} is 0 throughout the run, so no peak can be found for it")
    return peak


def _label(entry: dict[str, Any], base: Config) -> str:
    """The schedule's name and what the entry says of it."""
    own = {key: value for key, value in entry.items() if key not in ("name", "warmup", "peak")}
    label = "-".join([str(entry.get("name", base.schedule.name)), *(f"{key}_{_slug(own[key])}" for key in own)])
    if len(label) <= _LONGEST_LABEL:
        return label
    return f"{label[: _LONGEST_LABEL - 17]}-{content_hash(own)}"


def _slug(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, Length):
        if value.unit in ("steps", "tokens") and not value.value:
            return "0"
        value = str(value).removesuffix(" steps")
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text.replace("%", "pct").replace("e+", "e").replace(" ", "")).strip("_")


def _checked(study: Study, path: Path, values: dict[str, Any], places: list[_Place]) -> list[Run]:
    """The runs. Raises one ConfigError with every fault and the runs that have it."""
    runs, faults = [], dict[str, list[str]]()
    for index, place in enumerate(places, start=1):
        try:
            config = validate(_run_values(study, values, place), "")
            schedule = plan(config.schedule, config.batch.tokens, config.optim.betas[1])
            if config.optim.weight_decay_schedule is not None:
                plan(config.optim.weight_decay_schedule, config.batch.tokens, config.optim.betas[1])
        except LlmtrainError as error:
            for line in str(error).removeprefix(":\n").splitlines():
                faults.setdefault(line.strip(), []).append(place.name)
            continue
        runs.append(Run(index, place.name, place.cell, config, schedule))
    if faults:
        lines = [f"\n  {fault} ({_some(names)})" for fault, names in faults.items()]
        raise ConfigError(f"study {path}:{''.join(lines)}")
    return runs


def _run_values(study: Study, values: dict[str, Any], place: _Place) -> dict[str, Any]:
    """The raw config of one run. What a base shares out by name, each run has for itself."""
    own: dict[str, Any] = {
        "run": {"name": place.name, "dir": str(study.folder / place.name), "seed": place.seed},
        "schedule": place.schedule,
    }
    checkpoints = values.get("checkpoint") or {}
    if isinstance(checkpoints, dict) and checkpoints.get("dir"):
        own["checkpoint"] = {"dir": f"{str(checkpoints['dir']).rstrip('/')}/{place.name}"}
    return _laid_over({key: value for key, value in copy.deepcopy(values).items() if key != "schedule"}, own)


def _require_different(path: Path, runs: list[Run]) -> None:
    """Raise where two runs have one name, or would be one and the same training."""
    names: dict[str, Run] = {}
    trainings: dict[str, Run] = {}
    for run in runs:
        same = trainings.setdefault(content_hash([run.schedule.spec, run.config.run.seed]), run)
        if same is not run:
            raise ConfigError(f"study {path}: {same.name} and {run.name} are one training: leave one out of the grid")
        if names.setdefault(run.name, run) is not run:
            raise ConfigError(
                f'study {path}: two runs would be called "{run.name}", apart only in the seventh digit of the peak'
            )


def _some(names: list[str]) -> str:
    rest = len(names) - _TOLD
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:_TOLD])} and {rest} more"
