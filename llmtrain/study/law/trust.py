"""How far may a fitted law be trusted, and where not at all?

Three sources of doubt make an interval: moving-block bootstrap (noise of the losses), leaving out each curve in turn
(what the law gets wrong about a schedule it has not seen), and what the two laws disagree by. Guard rails say by name
where a law has nothing to say: some refuse, some mark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmtrain.errors import DataError
from llmtrain.schedules.exact import FloatArray
from llmtrain.study.law.curves import LossCurve
from llmtrain.study.law.fit import Fit, fit_law
from llmtrain.study.law.laws import Track, drops

FEWEST_POINTS = 40  # of a fitted curve
FEWEST_IN_DECAY = 10  # of a fitted curve that decays
RESAMPLES = 40
FARTHEST = 2.0  # horizons, as a multiple of the longest fitted one, before a prediction is marked
_BLOCK = 10  # points that are resampled together
_SAME_PEAK = 1e-3  # relative
_RISE = 1e-6  # of the peak: smaller ones are rounding


class Doubt(NamedTuple):
    """One guard rail that a schedule or a fit runs into."""

    name: str
    refuses: bool
    text: str


@dataclass(frozen=True)
class Range:
    """What the fitted curves covered; outside of it a law guesses."""

    peak: float
    warmup: int
    updates: int  # of the longest
    lowest: float  # multiplier that a fitted curve came down to
    setting: dict[str, Any]


def check_curves(curves: Sequence[LossCurve]) -> None:
    """Raise DataError, with the name of the guard rail, unless a law can be fitted to these curves."""
    if len(curves) < 2:
        raise DataError(
            f"one_run: a law needs at least two runs, found {len(curves)}: one with a sharp decay (wsd) and one that "
            "decays slowly or not at all (cosine, linear, constant)"
        )
    peak = curves[0].peak
    for curve in curves:
        _check_points(curve)
        if abs(curve.peak / peak - 1) > _SAME_PEAK:
            raise DataError(
                f"peaks_differ: {curves[0].name} has the peak {peak:g} and {curve.name} {curve.peak:g}; "
                "a law holds for one peak"
            )
        if _rise(curve.lrs / curve.peak, curve.warmup):
            raise DataError(
                f"rises: the learning rate of {curve.name} rises after its warm-up ({curve.warmup} updates); these "
                "laws know falls only. If the warm-up is longer, say --warmup"
            )
    check_settings(curves)
    falls = [drops(curve.lrs / peak, curve.warmup) for curve in curves]
    if not any(fall.any() for fall in falls):
        raise DataError(f"no_decay: the learning rate of {_names(curves)} never falls; add a run that decays (wsd)")
    if not any(_sharp(fall, curve) or _holds(curve) for fall, curve in zip(falls, curves, strict=True)):
        raise DataError(
            f"slow_decays_only: {_names(curves)} all decay slowly over the whole run, which does not tell what a decay "
            "brings from what it costs; add a run with a trunk: wsd, or constant"
        )


def check_settings(curves: Sequence[LossCurve]) -> None:
    """Raise DataError where two curves are known to differ in more than their schedule."""
    known: dict[str, tuple[str, Any]] = {}
    for curve in curves:
        for what, value in curve.setting.items():
            name, other = known.setdefault(what, (curve.name, value))
            if other != value:
                raise DataError(
                    f"settings_differ: {what} is {other} in {name} and {value} in {curve.name}; a law is for "
                    "runs that differ in their schedule alone"
                )


def doubts_of_fit(curves: Sequence[LossCurve], fits: Sequence[Fit]) -> list[Doubt]:
    """Marks on a fit that was possible."""
    found = []
    if not any(_sharp(drops(curve.lrs / curve.peak, curve.warmup), curve) for curve in curves):
        text = "no run has a sharp decay, so that what a decay brings is told badly; add a wsd run"
        found.append(Doubt("no_sharp_decay", False, text))
    for fit in fits:
        if fit.unidentified:
            text = f"{fit.law.name}: the runs do not tell {', '.join(fit.unidentified)}, which ended at a bound"
            found.append(Doubt("unidentified", False, text))
    return found


def doubts_of_schedule(fitted: Range, lrs: FloatArray, warmup: int, setting: dict[str, Any]) -> list[Doubt]:
    """Every guard rail that a schedule of `lrs`, for updates 1 to T, runs into."""
    peak, updates, multipliers = float(lrs.max()), len(lrs), lrs / fitted.peak
    if updates <= warmup:
        return [Doubt("in_warmup", True, f"it ends within its warm-up ({warmup} updates)")]
    found = []
    if peak > fitted.peak * (1 + _SAME_PEAK):
        text = f"its peak {peak:g} is above the fitted {fitted.peak:g}: the law would promise more for any peak"
        found.append(Doubt("peak_above", True, text))
    if peak < fitted.peak * (1 - _SAME_PEAK):
        found.append(Doubt("peak_below", False, f"its peak {peak:g} is below the fitted {fitted.peak:g}"))
    if _rise(multipliers, warmup):
        found.append(Doubt("rises", True, "its learning rate rises after the warm-up; these laws know falls only"))
    if updates > FARTHEST * fitted.updates:
        text = f"its {updates} updates are more than {FARTHEST:g} times the longest fitted run ({fitted.updates})"
        found.append(Doubt("horizon_beyond", False, text))
    if multipliers[-1] < fitted.lowest * (1 - _SAME_PEAK) - _RISE:
        text = f"it falls to {multipliers[-1]:.3g} of the peak, no fitted run below {fitted.lowest:.3g}"
        found.append(Doubt("lr_below", False, text))
    if updates > 1 and np.all(lrs[-2:] == 0):
        text = "it goes on at learning rate 0, where the momentum law would let the loss fall for ever"
        found.append(Doubt("zero_tail", False, text))
    for what in sorted(fitted.setting.keys() & setting.keys()):
        if setting[what] != fitted.setting[what]:
            text = f"{what} is {setting[what]}, the fitted runs have {fitted.setting[what]}"
            found.append(Doubt("setting", True, text))
    return found


def bootstrap(fit: Fit, tracks: Sequence[Track], losses: Sequence[FloatArray], seed: int = 0) -> list[Fit]:
    """Fits to the fitted curves with their residuals resampled, in moving blocks within each curve."""
    generator = np.random.default_rng(seed)
    fitted = [fit.losses(seen) for seen in tracks]
    found = []
    for _ in range(RESAMPLES):
        again = [
            smooth + _resampled(measured - smooth, generator) for smooth, measured in zip(fitted, losses, strict=True)
        ]
        found.append(fit_law(fit.law, tracks, again, fit.exponents))
    return found


def left_out(fit: Fit, tracks: Sequence[Track], losses: Sequence[FloatArray]) -> list[FloatArray]:
    """For each curve, the errors at its places of a law fitted to the other curves, in nats."""
    errors = []
    for i, (seen, measured) in enumerate(zip(tracks, losses, strict=True)):
        others = [j for j in range(len(tracks)) if j != i]
        without = fit_law(fit.law, [tracks[j] for j in others], [losses[j] for j in others])
        errors.append(without.losses(seen) - measured)
    return errors


def _resampled(residuals: FloatArray, generator: np.random.Generator) -> FloatArray:
    size = min(_BLOCK, len(residuals))
    starts = generator.integers(0, len(residuals) - size + 1, -(-len(residuals) // size))
    return np.concatenate([residuals[start : start + size] for start in starts])[: len(residuals)]


def _check_points(curve: LossCurve) -> None:
    points = len(curve.steps)
    if points < FEWEST_POINTS:
        raise DataError(
            f"too_few_points: {curve.name} has {points} losses after its warm-up ({curve.warmup} updates), wanted "
            f"{FEWEST_POINTS}: lower validation.every, or fit training losses with --loss train"
        )
    fall = drops(curve.lrs / curve.peak, curve.warmup)
    inside = int(np.sum(curve.steps > np.argmax(fall != 0))) if fall.any() else points
    if inside < FEWEST_IN_DECAY:
        raise DataError(
            f"too_few_in_decay: {curve.name} has {inside} losses after its learning rate first falls, wanted "
            f"{FEWEST_IN_DECAY}: lower validation.every, or fit training losses with --loss train"
        )


def _rise(multipliers: FloatArray, warmup: int) -> bool:
    return bool(np.any(np.diff(multipliers)[max(warmup - 1, 0) :] > _RISE))


def _sharp(fall: FloatArray, curve: LossCurve) -> bool:
    """Whether half of a curve's whole fall lies within a quarter of its updates."""
    so_far = np.concatenate([[0.0], np.cumsum(fall)])
    width = max((len(fall) - curve.warmup) // 4, 1)
    return bool(so_far[-1] > 0 and np.max(so_far[width:] - so_far[:-width]) >= so_far[-1] / 2)


def _holds(curve: LossCurve) -> bool:
    """Whether a curve stays at its peak for a tenth of its updates after the warm-up."""
    after = curve.lrs[curve.warmup :]
    return bool(np.mean(after >= curve.peak * (1 - _RISE)) >= 0.1)


def _names(curves: Sequence[LossCurve]) -> str:
    return ", ".join(curve.name for curve in curves)
