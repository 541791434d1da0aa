"""At which peaks may two schedules be compared, and what does each comparison show?

Three readings, each a family of its own for Holm's rule: every schedule at its own best peak, pairs of the same area
under the learning rates (within 2 %), and pairs of the same peak. An entry is one schedule at one peak, its seeds
replicates. The best peak is the best of those that were run; where it lies between them is told beside it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmtrain.study.record import RunRecord
from llmtrain.study.statistics import Difference, Judgement, PeakFit, TextNoise, difference, fit_peak, judge, text_noise

ReadingName = Literal["best peak", "same area", "same peak"]

AREA_TOLERANCE = 0.02
_FEWEST_DOCUMENTS = 20  # from which the noise of the text can be told
_NAMED = 6  # runs or schedules that a message names


@dataclass(frozen=True)
class Entry:
    """One schedule at one peak."""

    cell: str
    peak: float
    runs: dict[int, RunRecord]  # by seed

    @property
    def losses(self) -> dict[int, float]:
        return {seed: run.loss for seed, run in self.runs.items()}

    @property
    def loss(self) -> float:
        """Mean over the seeds, nats per token."""
        return float(np.mean(list(self.losses.values())))

    @property
    def deviation(self) -> float | None:
        """Of the loss from seed to seed."""
        return float(np.std(list(self.losses.values()), ddof=1)) if len(self.runs) > 1 else None

    @property
    def area(self) -> float:
        return next(iter(self.runs.values())).area

    @property
    def annealed(self) -> bool:
        return all(run.final["decayed"] for run in self.runs.values())


@dataclass(frozen=True)
class Compared:
    """An entry beside one of the baseline."""

    ours: Entry
    theirs: Entry
    judgement: Judgement
    noise: TextNoise | None  # of the validation text; None where it is not known what each document cost both


@dataclass(frozen=True)
class Reading:
    """Comparisons of one kind, the best first."""

    name: ReadingName
    compared: list[Compared]
    missing: str = ""  # which schedules the runs given do not allow it for, and what to run


def named(entry: Entry, others: Iterable[Entry]) -> str:
    """The entry's schedule, with its peak where that schedule was run at several."""
    several = len({other.peak for other in others if other.cell == entry.cell}) > 1
    return f"{entry.cell} at {entry.peak:g}" if several else entry.cell


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _NAMED
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:_NAMED])} and {rest} more"


def fit_peaks(entries: Sequence[Entry], tried: Iterable[tuple[str, float]]) -> dict[str, PeakFit]:
    """The best peak of every cell that was run at several, from means over the seeds that all its peaks share.

    `tried`: cells and peaks of runs that did not reach their end. A best peak beside one of them is at no edge.
    """
    cells: dict[str, list[Entry]] = {}
    for entry in entries:
        cells.setdefault(entry.cell, []).append(entry)
    fits = {}
    for cell, own in cells.items():
        if len(own) < 2:
            continue
        shared = set.intersection(*(set(entry.runs) for entry in own))
        fits[cell] = fit_peak(
            {entry.peak: float(np.mean([entry.losses[seed] for seed in shared or entry.runs])) for entry in own},
            [peak for other, peak in tried if other == cell],
        )
    return fits


def at_best_peak(entries: Sequence[Entry], fits: dict[str, PeakFit], against: str, margin: float) -> Reading:
    """Every schedule that was run at several peaks, at its best, with the cell `against` at its own."""
    best = {entry.cell: entry for entry in entries if entry.cell in fits and entry.peak == fits[entry.cell].best}
    cells = list(dict.fromkeys(entry.cell for entry in entries))
    once = [cell for cell in cells if cell not in fits and len(cells) > 1]
    missing = f"Run at one peak only: {some(once)}. Run each at three or more, a factor 2 apart." if once else ""
    theirs = best.pop(against, None)
    return _judged("best peak", [(ours, theirs) for ours in best.values()] if theirs else [], margin, missing)


def at_same_area(entries: Sequence[Entry], against: str, margin: float) -> Reading:
    """Every schedule at the peak at which its area is nearest to one of `against`, where that is within 2 %."""
    pairs, wanted = [], {}
    for theirs in (entry for entry in entries if entry.cell == against and entry.area > 0):
        for cell in dict.fromkeys(entry.cell for entry in entries if entry.cell != against):
            known = [entry for entry in entries if entry.cell == cell and entry.area > 0]
            if not known:
                continue
            nearest = min(known, key=lambda entry: abs(math.log(entry.area / theirs.area)))
            if abs(math.log(nearest.area / theirs.area)) <= AREA_TOLERANCE:
                pairs.append((nearest, theirs))
            else:
                wanted[cell] = f"{cell} with schedule.peak={nearest.peak * theirs.area / nearest.area:.3g}"
    for ours, _ in pairs:
        wanted.pop(ours.cell, None)
    missing = f"Not within 2 % of the area of {against}: run {some(list(wanted.values()))}." if wanted else ""
    return _judged("same area", pairs, margin, missing)


def at_same_peak(entries: Sequence[Entry], against: str, margin: float) -> Reading:
    """Every schedule at every peak at which `against` was run too."""
    by_peak = {entry.peak: entry for entry in entries if entry.cell == against}
    pairs = [(entry, by_peak[entry.peak]) for entry in entries if entry.cell != against and entry.peak in by_peak]
    others = dict.fromkeys(entry.cell for entry in entries if entry.cell != against)
    apart = [cell for cell in others if cell not in {ours.cell for ours, _ in pairs}]
    return _judged("same peak", pairs, margin, f"Not run at a peak of {against}: {some(apart)}." if apart else "")


def _judged(name: ReadingName, pairs: Sequence[tuple[Entry, Entry]], margin: float, missing: str) -> Reading:
    nats = math.log1p(margin)
    differences = [difference(ours.losses, theirs.losses, nats) for ours, theirs in pairs]
    judged = zip(pairs, judge(differences, nats), strict=True)
    compared = [
        Compared(ours, theirs, one, _text_noise(ours, theirs, one.difference)) for (ours, theirs), one in judged
    ]
    return Reading(name, sorted(compared, key=lambda one: one.judgement.difference.mean), missing)


def _text_noise(ours: Entry, theirs: Entry, found: Difference) -> TextNoise | None:
    """From documents scored by both, averaged over the seeds that the difference is paired over."""
    seeds = sorted(ours.runs.keys() & theirs.runs.keys())
    both = [(ours.runs[seed].documents, theirs.runs[seed].documents) for seed in seeds]
    known = [(a, b) for a, b in both if a is not None and b is not None and np.array_equal(a[:, 1], b[:, 1])]
    if not found.paired or not known or len(known) < len(both):
        return None
    tokens = known[0][0][:, 1]
    if np.count_nonzero(tokens) < _FEWEST_DOCUMENTS:
        return None
    return text_noise(np.mean([a[:, 0] - b[:, 0] for a, b in known], axis=0), tokens)
