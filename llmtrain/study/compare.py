"""Which schedule predicts held-out text better at the same number of tokens, and is that real?

Reads run folders alone. Runs that follow one schedule, at whatever peak and seed, are a cell; cells are compared with
one of them, the baseline, as `llmtrain.study.readings` says. Runs that differ in what `MUST_AGREE` names are not ranked
against each other; a run that did not reach its end is set aside. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtrain.data.manifest import Baseline, load_manifest
from llmtrain.errors import ConfigError, DataError, did_you_mean
from llmtrain.model.size import parameter_count
from llmtrain.study.readings import (
    AREA_TOLERANCE,
    Entry,
    Reading,
    at_best_peak,
    at_same_area,
    at_same_peak,
    fit_peaks,
    some,
)
from llmtrain.study.record import RunRecord, differs_in_setting, read_record, read_study_file, run_folders
from llmtrain.study.statistics import PeakFit
from llmtrain.train.metrics import METRICS_FILE

MARGIN = 0.005  # of perplexity: a difference that is none for practical purposes
_RATE_TOLERANCE = 1e-6  # of the peak
_SHORT = 20  # tokens a parameter: Hoffmann 2022, arXiv:2203.15556
MUST_AGREE = {
    "tokens": ("tokens seen", "compare runs of one length; branch a cooldown off the longer one to shorten it"),
    "data_hash": ("data", "train again from one prepared folder, data.path"),
    "tokenizer_hash": ("tokenizer", "train again with one tokenizer, or look at nats/byte alone"),
    "set_hash": (
        "validation set",
        "train again with one data.path, validation.max_tokens and batch.seq_len, or look at nats/byte alone",
    ),
    "model_hash": ("model", "train again with one model section"),
    "initial_weights": ("initial weights", "train again with one run.init_from"),
}


@dataclass(frozen=True)
class Comparison:
    """Runs, the best first, and what may be said of their schedules."""

    runs: list[RunRecord]
    set_aside: list[RunRecord]  # they did not reach their end
    cell_of: dict[Path, str]  # by run folder
    entries: list[Entry]
    mismatches: list[str]
    baselines: dict[str, Baseline]  # what a model without context reaches
    baseline: str  # the cell that others are compared with
    margin: float  # of perplexity
    target: float | None
    fits: dict[str, PeakFit]  # by cell, where it was run at several peaks
    readings: list[Reading]
    warnings: list[str] = field(default_factory=list)


def compare(
    paths: Sequence[Path], *, baseline: str | None = None, margin: float = MARGIN, target: float | None = None
) -> Comparison:
    """Read runs, or folders of runs, and compare their schedules with `baseline`: a cell, a schedule or a run.

    Without one it is that of the study, or the schedule of the first run. `margin`: what share of perplexity counts as
    no difference. Raises DataError and ConfigError.
    """
    records, warnings = _read(run_folders(paths))
    warnings += _not_begun(paths)
    ended = [run for run in records if not run.unfinished]
    runs, set_aside = (ended, [run for run in records if run.unfinished]) if ended else (records, [])
    mismatches = _mismatches(runs)
    labels = _labels(records)
    cell_of = {run.folder: labels[run.key] for run in records}
    baseline = baseline or _baseline_of_study(paths, records)
    against = _baseline_cell(baseline, records, cell_of) if baseline else cell_of[runs[0].folder]
    if mismatches:
        return Comparison(
            runs, set_aside, cell_of, [], mismatches, _baselines(records), against, margin, target, {}, [], warnings
        )
    entries, repeated = _entries(runs, cell_of)
    fits = fit_peaks(entries, [(cell_of[run.folder], run.peak) for run in set_aside])
    readings = [
        at_best_peak(entries, fits, against, margin),
        at_same_area(entries, against, margin),
        at_same_peak(entries, against, margin),
    ]
    warnings += [*_lost(set_aside, cell_of), *repeated, *_doubts(runs, entries, cell_of), *_edges(fits)]
    return Comparison(
        runs=sorted(runs, key=lambda run: run.loss),
        set_aside=set_aside,
        cell_of=cell_of,
        entries=sorted(entries, key=lambda entry: entry.loss),
        mismatches=[],
        baselines=_baselines(records),
        baseline=against,
        margin=margin,
        target=target,
        fits=fits,
        readings=readings,
        warnings=warnings,
    )


def _read(folders: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """All runs that have a validation; the others are told of, where there is one to go on with."""
    records, missing = [], []
    for folder in folders:
        try:
            records.append(read_record(folder))
        except DataError as error:
            missing.append(error)
    if not records:
        raise missing[0]
    names = [run.name for run in records]
    doubled = {name for name in names if names.count(name) > 1}
    records = [
        replace(run, name=f"{run.folder.parent.name}/{run.name}") if run.name in doubled else run for run in records
    ]
    return records, [f"left out: {error}" for error in missing]


def _not_begun(paths: Sequence[Path]) -> list[str]:
    """What a study asks for and nobody has trained yet."""
    found = []
    for path in paths:
        study = read_study_file(path)
        waiting = [name for name in study.runs if not (path / name / METRICS_FILE).is_file()] if study else []
        if study is not None and waiting:
            found.append(f"not begun, of the study {study.name}: {some(waiting)}")
    return found


def _baseline_of_study(paths: Sequence[Path], records: Sequence[RunRecord]) -> str | None:
    """A run of the baseline that a study names, where that study alone is compared."""
    study = read_study_file(paths[0]) if len(paths) == 1 else None
    return next((run.name for run in records if study is not None and run.name in study.baseline), None)


def _mismatches(runs: Sequence[RunRecord]) -> list[str]:
    found = []
    for key, (what, remedy) in MUST_AGREE.items():
        by_value: dict[Any, list[str]] = {}
        for run in runs:
            by_value.setdefault(run.final.get(key), []).append(run.name)
        if len(by_value) > 1:
            sides = "; ".join(f"{value} in {some(names)}" for value, names in by_value.items())
            found.append(f"{what} differ: {sides}. To compare them: {remedy}")
    return found


def _labels(records: Sequence[RunRecord]) -> dict[str, str]:
    """A name for each key: the schedule, and what tells it from the others."""
    traits = {run.key: run.traits for run in records}
    shared = set.intersection(*(set(one) for one in traits.values())) - {"schedule"}
    varies = {name for name in shared if len({one[name] for one in traits.values()}) > 1}
    labels: dict[str, str] = {}
    for key, own in traits.items():
        alike = [one for one in traits.values() if one["schedule"] == own["schedule"]]
        shown = [
            f"{name}={own[name]}"
            for name in own
            if name != "schedule"
            and (name in varies or (name not in shared and len({one.get(name) for one in alike}) > 1))
        ]
        label = " ".join([own["schedule"], *shown])
        again = sum(other == label or other.startswith(f"{label} (") for other in labels.values())
        labels[key] = f"{label} ({again + 1})" if again else label
    return labels


def _baseline_cell(name: str, records: Sequence[RunRecord], cell_of: dict[Path, str]) -> str:
    cells = sorted(set(cell_of.values()))
    if name in cells:
        return name
    found = {cell_of[run.folder] for run in records if name in (run.name, run.traits["schedule"])}
    if len(found) == 1:
        return found.pop()
    if found:
        raise ConfigError(f"--baseline {name} could be {', '.join(sorted(found))}: write one of these")
    raise ConfigError(f'--baseline "{name}" is no schedule and no run of these{did_you_mean(name, cells)}')


def _entries(runs: Sequence[RunRecord], cell_of: dict[Path, str]) -> tuple[list[Entry], list[str]]:
    """Runs by cell and peak; a seed that is there twice counts once."""
    found: dict[tuple[str, float], Entry] = {}
    repeated = []
    for run in runs:
        place = (cell_of[run.folder], run.peak)
        entry = found.setdefault(place, Entry(*place, {}))
        if run.seed in entry.runs:
            first = entry.runs[run.seed].name
            repeated.append(f"{run.name} repeats {first}, seed and all: only {first} counts as a replicate")
            continue
        entry.runs[run.seed] = run
    return list(found.values()), repeated


def _lost(set_aside: Sequence[RunRecord], cell_of: dict[Path, str]) -> list[str]:
    return [
        f"{run.name} ({cell_of[run.folder]}, peak {run.peak:g}, seed {run.seed}) did not reach its end: "
        f"{run.unfinished}; it is left out, and what is left of its schedule looks better for it"
        for run in set_aside
    ]


def _doubts(runs: Sequence[RunRecord], entries: Sequence[Entry], cell_of: dict[Path, str]) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    for run in runs:
        if run.unfinished:
            found.append(f"{run.name} did not reach its end: {run.unfinished}")
        if run.rate_error is not None and run.rate_error > _RATE_TOLERANCE:
            found.append(f"{run.name} used learning rates up to {run.rate_error:.2g} of its peak off its schedule")
    spiky = [f"{run.name} {count}" for run in runs if (count := run.spikes)]
    if spiky:
        found.append(f"spikes of the training loss: {some(spiky)}")
    raw = list(dict.fromkeys(entry.cell for entry in entries if not entry.annealed))
    if raw and any(entry.annealed for entry in entries):
        found.append(
            f"not annealed at the end: {some(raw)}. A cooldown would lower its loss, so it is not comparable with "
            "annealed ones"
        )
    elif raw:
        found.append("no run was annealed at its end: a cooldown may turn the order round")
    settings = {name for run in runs for name in run.traits if differs_in_setting(name)}
    changed = sorted(name for name in settings if len({run.traits.get(name) for run in runs}) > 1)
    if changed:
        found.append(f"the runs differ in more than their schedule: {', '.join(changed)}")
    areas = {entry.area for entry in entries if entry.area > 0}
    if areas and max(areas) > (1 + AREA_TOLERANCE) * min(areas) and len({entry.cell for entry in entries}) > 1:
        found.append(_area_decides(runs[0], min(areas), max(areas)))
    return found


def _area_decides(run: RunRecord, least: float, most: float) -> str:
    """What areas that differ mean for runs of this length."""
    said = f"the areas under the learning rates lie between {least:.4g} and {most:.4g}"
    density = run.final["tokens"] / parameter_count(run.config.model)
    if density >= _SHORT:
        return f"{said}: part of what schedules differ in may be that alone"
    return (
        f"{said}, and runs of {density:.2g} tokens a parameter are short: there the area decides nearly alone, and "
        "what schedules differ in says nothing about long runs"
    )


def _edges(fits: dict[str, PeakFit]) -> list[str]:
    return [
        f"{cell}: its best peak {fit.best:g} is the {fit.edge} that was run; run one beyond it"
        for cell, fit in fits.items()
        if fit.edge
    ]


def _baselines(runs: Sequence[RunRecord]) -> dict[str, Baseline]:
    """Uniform and unigram predictors on the same validation set, where the data is still there."""
    try:
        manifest = load_manifest(runs[0].config.data.path)
    except DataError:  # a report must not fail because data moved away
        return {}
    return {"uniform": manifest.uniform, "unigram": manifest.unigram}
