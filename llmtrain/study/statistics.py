"""Is a difference between two schedules real, or what another seed would have given?

A difference is (this one) - (baseline) in nats per token: below 0 is better. Runs of one seed share initial weights and
data order, so their losses rise and fall together, and differences are taken seed by seed wherever two seeds are
shared. Intervals are 95 % t-intervals over seeds. Noise of the seeds and noise of the validation text are two things,
and are kept apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from llmtrain.schedules.exact import FloatArray

Verdict = Literal["better", "worse", "equivalent", "not resolvable", "one seed"]

LEVEL = 0.05
SPIKE_WINDOW = 128  # updates before the one that is judged, as in OLMo-core's SkipStep
SPIKE_SIGMAS = 6.0
PEAK_REACH = 2.0  # doublings around the best peak that the parabola is fitted to
_POWER = 7.85  # (z of 0.975 + z of 0.8) squared: a difference is found in four cases of five
_RESAMPLES = 1000
_GROUPS = 2000


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds with what can be said of it, in nats. Without replicates there is no interval."""

    mean: float
    seeds: int  # shared seeds where paired, else the fewer of the two
    paired: bool
    deviation: float | None = None  # of the difference in one seed
    low: float | None = None
    high: float | None = None
    p: float | None = None  # of no difference, two-sided
    p_equivalent: float | None = None  # of a difference as large as the margin, either way


@dataclass(frozen=True)
class Judgement:
    """A difference in the company of the others that were asked about at once."""

    difference: Difference
    verdict: Verdict
    p: float | None  # of no difference, by Holm's rule
    p_equivalent: float | None  # likewise
    seeds_needed: int | None  # to find a difference of the margin in four cases of five


@dataclass(frozen=True)
class TextNoise:
    """How far a difference in loss would move with other validation text, in nats."""

    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class PeakFit:
    """Loss over the binary logarithm of the peak, a parabola around the best peak that was run."""

    best: float  # the peak run with the lowest loss
    edge: Literal["", "lowest", "highest"]  # where no lower, or no higher, peak was run
    optimum: float | None = None  # of the parabola; None where fewer than three peaks are near, or it has no minimum
    loss: float | None = None  # there
    rise: float | None = None  # of the loss at half and at double the optimum


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], margin: float) -> Difference:
    """The difference of two schedules from final losses by seed. `margin` in nats is what equivalence is asked for.

    Paired over the seeds both have where these are two or more; else Welch's, where both have two or more seeds. With
    less there is no interval, and the mean is over shared seeds, or over all where none is shared.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) >= 2:
        by_seed = np.array([ours[seed] - theirs[seed] for seed in shared])
        spread = float(by_seed.std(ddof=1))
        error = spread / math.sqrt(len(shared))
        return _with_interval(float(by_seed.mean()), len(shared), True, spread, error, len(shared) - 1, margin)
    a, b = np.array(list(ours.values())), np.array(list(theirs.values()))
    if min(len(a), len(b)) >= 2:
        va, vb = float(a.var(ddof=1)), float(b.var(ddof=1))
        ea, eb = va / len(a), vb / len(b)
        freedom = (ea + eb) ** 2 / (ea**2 / (len(a) - 1) + eb**2 / (len(b) - 1)) if ea + eb > 0 else len(a) - 1.0
        mean = float(a.mean() - b.mean())
        return _with_interval(mean, min(len(a), len(b)), False, math.sqrt(va + vb), math.sqrt(ea + eb), freedom, margin)
    if shared:
        return Difference(ours[shared[0]] - theirs[shared[0]], 1, True)
    return Difference(float(a.mean() - b.mean()), 1, False)


def judge(differences: Sequence[Difference], margin: float) -> list[Judgement]:
    """What may be said of several differences at once: in 19 of 20 such families no claim of one kind is false."""
    known = [i for i, one in enumerate(differences) if one.p is not None]
    p = dict(zip(known, holm([differences[i].p or 0.0 for i in known]), strict=True))
    same = dict(zip(known, holm([differences[i].p_equivalent or 0.0 for i in known]), strict=True))
    judged = []
    for i, one in enumerate(differences):
        verdict = _verdict(one, p.get(i), same.get(i))
        needed = None
        if verdict == "not resolvable" and one.deviation is not None:
            needed = seeds_needed(one.deviation, margin)
        judged.append(Judgement(one, verdict, p.get(i), same.get(i), needed))
    return judged


def holm(p: Sequence[float]) -> list[float]:
    """p-values for as many questions asked at once (Holm 1979): no order or independence is assumed."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def seeds_needed(deviation: float, effect: float) -> int:
    """Seeds with which a true difference of `effect` is found in four cases of five."""
    return math.ceil(_POWER * (deviation / effect) ** 2 + 2)


def text_noise(differences: FloatArray, tokens: FloatArray, seed: int = 0) -> TextNoise:
    """Bootstrap over the documents of the validation set, both schedules scored on the same ones.

    `differences`: of the summed nats of each document, `tokens`: its tokens; both (D,). More than 2000 documents are
    drawn in as many groups of neighbours.
    """
    sums = np.stack([differences, tokens], axis=1)  # (D, 2)
    if len(sums) > _GROUPS:
        sums = np.add.reduceat(sums, np.linspace(0, len(sums), _GROUPS, endpoint=False).astype(np.int64), axis=0)
    every = np.full(len(sums), 1 / len(sums))
    drawn = np.random.default_rng(seed).multinomial(len(sums), every, size=_RESAMPLES).astype(np.float64) @ sums
    means = drawn[:, 0] / drawn[:, 1]
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return TextNoise(float(means.std(ddof=1)), float(low), float(high))


def fit_peak(losses: Mapping[float, float], tried: Sequence[float] = ()) -> PeakFit:
    """The best peak from mean losses by peak, and a parabola over log2 through the runs within two doublings of it.

    `tried`: further peaks, at which training did not reach its end.
    """
    best = min(losses, key=lambda peak: losses[peak])
    edge: Literal["", "lowest", "highest"] = ""
    if best == max(*losses, *tried):
        edge = "highest"
    elif best == min(*losses, *tried):
        edge = "lowest"
    near = sorted(peak for peak in losses if abs(math.log2(peak / best)) <= PEAK_REACH + 1e-9)
    if len(near) < 3:
        return PeakFit(best, edge)
    x = np.array([math.log2(peak / best) for peak in near])
    curvature, slope, height = (float(c) for c in np.polyfit(x, [losses[peak] for peak in near], 2))
    at = -slope / (2 * curvature) if curvature > 0 else math.inf
    if not x[0] <= at <= x[-1]:
        return PeakFit(best, edge)
    return PeakFit(best, edge, best * 2**at, height + slope * at / 2, curvature)


def spikes(losses: FloatArray) -> int:
    """How often the training loss left mean + 6 sigma of the 128 updates before. Consecutive updates count once."""
    if len(losses) <= SPIKE_WINDOW:
        return 0
    centred = losses - losses.mean()
    first = np.concatenate([[0.0], np.cumsum(centred)])
    second = np.concatenate([[0.0], np.cumsum(centred**2)])
    mean = (first[SPIKE_WINDOW:-1] - first[: -SPIKE_WINDOW - 1]) / SPIKE_WINDOW
    square = (second[SPIKE_WINDOW:-1] - second[: -SPIKE_WINDOW - 1]) / SPIKE_WINDOW
    sigma = np.sqrt(np.maximum(square - mean**2, 0.0))
    above = centred[SPIKE_WINDOW:] > mean + SPIKE_SIGMAS * np.maximum(sigma, 1e-9)
    return int(above[0]) + int(np.sum(above[1:] & ~above[:-1]))


def _with_interval(
    mean: float, seeds: int, paired: bool, deviation: float, error: float, freedom: float, margin: float
) -> Difference:
    half = float(stdtrit(freedom, 1 - LEVEL / 2)) * error
    return Difference(
        mean=mean,
        seeds=seeds,
        paired=paired,
        deviation=deviation,
        low=mean - half,
        high=mean + half,
        p=2 * _beyond(abs(mean), error, freedom),
        p_equivalent=max(_beyond(mean + margin, error, freedom), _beyond(margin - mean, error, freedom)),
    )


def _beyond(distance: float, error: float, freedom: float) -> float:
    """Chance of a mean this far above a true one of 0."""
    if error == 0:
        return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
    return float(stdtr(freedom, -distance / error))


def _verdict(one: Difference, p: float | None, p_equivalent: float | None) -> Verdict:
    if p is None or p_equivalent is None:
        return "one seed"
    if p < LEVEL:
        return "better" if one.mean < 0 else "worse"
    return "equivalent" if p_equivalent < LEVEL else "not resolvable"
