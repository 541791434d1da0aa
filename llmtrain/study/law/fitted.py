"""What does a fitted law predict, how surely, and how well does it do on curves it has not seen?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtrain.errors import DataError
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.study.law import laws
from llmtrain.study.law.curves import LossCurve
from llmtrain.study.law.fit import Fit, fit_law, fit_momentum
from llmtrain.study.law.laws import track
from llmtrain.study.law.trust import (
    Doubt,
    Range,
    bootstrap,
    check_curves,
    doubts_of_fit,
    doubts_of_schedule,
    left_out,
)

_TWO_SIDED_95 = 1.96  # standard deviations
_COARSE = 100  # segments of drops where only the spread of fits matters


@dataclass(frozen=True)
class FittedLaw:
    """The primary law, the others beside it, and how far to trust them."""

    primary: Fit  # mpl
    others: tuple[Fit, ...]  # momentum, time, area
    resamples: tuple[Fit, ...]  # of the primary law
    range: Range
    runs: tuple[str, ...]
    left_out_mean: float  # mean absolute error on curves left out in turn, in nats
    left_out_rms: float
    doubts: tuple[Doubt, ...]

    @property
    def resolvable(self) -> float:
        """The smallest difference in nats between two schedules that means something."""
        return 2 * self.left_out_mean

    @property
    def momentum(self) -> Fit:
        return self.others[0]


@dataclass(frozen=True)
class Predicted:
    """Losses after some updates of one schedule, in nats per token. n places."""

    updates: IntArray  # (n,)
    losses: FloatArray  # (n,)
    half_widths: FloatArray  # (n,) of the 95 % interval
    momentum: FloatArray | None  # (n,) by the second law, where it has a say


def fit_curves(curves: Sequence[LossCurve]) -> FittedLaw:
    """Fit all laws. Raises DataError where a guard rail says that these curves cannot tell one."""
    check_curves(curves)
    peak = max(curve.peak for curve in curves)
    tracks, losses = [curve.track(peak) for curve in curves], [curve.losses for curve in curves]
    primary, second = fit_law(laws.mpl(), tracks, losses), fit_momentum(tracks, losses)
    baselines = [fit_law(law, tracks, losses) for law in (laws.time_only(), laws.area_only())]
    coarse = [curve.track(peak, _COARSE) for curve in curves]
    errors = left_out(primary, coarse, losses)
    covered = Range(
        peak=peak,
        warmup=curves[0].warmup,
        updates=max(len(curve.lrs) for curve in curves),
        lowest=min(float(curve.lrs[curve.warmup - 1 :].min()) / peak for curve in curves),
        setting={what: value for curve in curves for what, value in curve.setting.items()},
    )
    return FittedLaw(
        primary=primary,
        others=(second, *baselines),
        resamples=tuple(bootstrap(primary, coarse, losses)),
        range=covered,
        runs=tuple(curve.name for curve in curves),
        left_out_mean=float(np.mean([np.mean(np.abs(error)) for error in errors])),
        left_out_rms=float(np.sqrt(np.mean([np.mean(error**2) for error in errors]))),
        doubts=tuple(doubts_of_fit(curves, (primary, second))),
    )


def predict(law: FittedLaw, lrs: FloatArray, warmup: int, updates: IntArray) -> Predicted:
    """The losses after `updates` of a run whose update k uses lrs[k - 1]. Guard rails are the caller's to look at."""
    seen = track(lrs / law.range.peak, warmup, updates)
    losses = law.primary.losses(seen)
    momentum = None if len(lrs) > 1 and np.all(lrs[-2:] == 0) else law.momentum.losses(seen)
    noise = np.std([one.losses(seen) for one in law.resamples], axis=0)
    unseen = law.left_out_rms * np.maximum(updates / law.range.updates, 1.0)
    between = 0.0 if momentum is None else losses - momentum
    return Predicted(updates, losses, _TWO_SIDED_95 * np.sqrt(noise**2 + unseen**2 + between**2), momentum)


def errors_on(law: FittedLaw, fit: Fit, curves: Sequence[LossCurve]) -> dict[str, Any]:
    """Relative errors of a law on measured curves: the mean and worst of each, the mean of means and the worst."""
    curves_found = {}
    for curve in curves:
        error = fit.losses(curve.track(law.range.peak)) - curve.losses
        relative = np.abs(error) / curve.losses
        curves_found[curve.name] = {
            "mean_relative_error": float(relative.mean()),
            "worst_relative_error": float(relative.max()),
            "final_error": float(error[-1]),
        }
    return {
        "mean_relative_error": float(np.mean([one["mean_relative_error"] for one in curves_found.values()])),
        "worst_relative_error": max(one["worst_relative_error"] for one in curves_found.values()),
        "curves": curves_found,
    }


def covered(law: FittedLaw, curves: Sequence[LossCurve]) -> float:
    """The share of the measured losses that lie in their 95 % interval."""
    inside = []
    for curve in curves:
        found = predict(law, curve.lrs, curve.warmup, curve.steps)
        inside.append(np.abs(found.losses - curve.losses) <= found.half_widths)
    return float(np.mean(np.concatenate(inside)))


def doubts_of_tests(law: FittedLaw, curves: Sequence[LossCurve]) -> dict[str, list[str]]:
    """The marks on measured curves. Raises DataError for a curve that the law cannot be compared with."""
    marks = {}
    for curve in curves:
        if not len(curve.steps):
            raise DataError(f"too_few_points: {curve.name} has no loss after its warm-up ({curve.warmup} updates)")
        doubts = doubts_of_schedule(law.range, curve.lrs, curve.warmup, curve.setting)
        for doubt in doubts:
            if doubt.refuses:
                raise DataError(f"{doubt.name}: the law says nothing about {curve.name}: {doubt.text}")
        marks[curve.name] = [doubt.name for doubt in doubts]
    return marks
