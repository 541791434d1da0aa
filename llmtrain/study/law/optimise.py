"""Which falling schedule does a law like best, at the fitted peak? Written as a `piecewise` section that can be run.

The search moves the logarithm of the multiplier at knots after the warm-up, each at or below the one before; between
knots the rate is the straight line that `piecewise` draws, so that what is searched is what is run. The momentum law is
not searched: it would let the loss fall without end.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import minimize

from llmtrain.errors import ConfigError, EnvironmentError, ScheduleError
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.study.law.fit import Fit
from llmtrain.study.law.fitted import FittedLaw
from llmtrain.study.law.laws import track
from llmtrain.study.law.ranking import COMMON, Asked, Ranked, rank
from llmtrain.study.schedule_shown import look_at
from llmtrain.units import Length

PLACES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)  # of knots: shares of what follows the warm-up
LOWEST = 1e-3  # multiplier that a search goes down to at most
_FINEST = 2000  # updates that a search looks at; a longer run is looked at in equal strides
_FALL_STARTS = (0.0, 0.5, 0.8)  # shares of the run after which the searches start to fall, in a straight line


@dataclass(frozen=True)
class Optimised:
    """The best schedule found, and what it gains."""

    section: dict[str, Any]  # `schedule` of a config
    ranked: list[Ranked]  # it and its rivals, the best first
    rival: str  # the best of the others
    gain: float  # nats by which it is predicted to lie below that
    interval: tuple[float, float]  # of the gain: the middle 95 % of the bootstrap
    resolvable: float  # a smaller gain means nothing

    @property
    def resolved(self) -> bool:
        """Whether the gain is one to believe."""
        return self.gain > self.resolvable and self.interval[0] > 0


def optimise(law: FittedLaw, updates: int, warmup: int, floor: float) -> Optimised:
    """The best `piecewise` schedule of `updates`, nowhere below `floor` of the peak after its warm-up, and its rivals.

    The rivals are registered shapes with the same peak, warm-up, horizon and floor.
    """
    if not 0 <= warmup < updates - 10 * len(PLACES):
        raise ScheduleError(
            f"--warmup {warmup} and --horizon {updates} leave {updates - warmup} updates to shape, wanted more than "
            f"{10 * len(PLACES)}"
        )
    section = _section(law.range.peak, updates, warmup, _search(law.primary, updates, warmup, max(floor, LOWEST)))
    shared = [f"peak={law.range.peak}", f"horizon={updates} steps", f"warmup={warmup} steps", f"floor={floor}"]
    rates = {one.label: one.lrs() for one in look_at(COMMON, (), shared)}
    rates["optimised"] = lrs_of(section)
    ranked = rank(law, [Asked(label, lrs, {}) for label, lrs in rates.items()])
    rival = next(one.label for one in ranked if one.label != "optimised")
    at = np.array([updates])
    ours, theirs = (track(rates[label] / law.range.peak, max(warmup, 1), at) for label in ("optimised", rival))
    gains = [float((one.losses(theirs) - one.losses(ours))[0]) for one in (law.primary, *law.resamples)]
    low, high = np.quantile(gains[1:], [0.025, 0.975]).tolist()
    return Optimised(section, ranked, rival, gains[0], (low, high), law.resolvable)


def length_in_updates(law: FittedLaw, where: str, written: str) -> int:
    """A length such as "20000 steps", or in tokens where the batch of the fitted runs is known."""
    try:
        length = Length.parse(written)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    batch = law.range.setting.get("tokens per update")
    if length.unit not in ("steps", "tokens") or (length.unit == "tokens" and batch is None):
        raise ConfigError(f'{where} "{written}": write it in steps' + ("" if batch is None else " or tokens"))
    return length.updates(batch or 1)


def section_yaml(section: dict[str, Any]) -> str:
    """The section as a config has it."""
    return yaml.safe_dump({"schedule": section}, sort_keys=False, default_flow_style=None, width=120)


def write_section(section: dict[str, Any], path: Path) -> None:
    """Keep the section. Raises EnvironmentError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(section_yaml(section), encoding="utf-8")
    except OSError as error:
        raise EnvironmentError(f"cannot write {path}: {error.strerror}") from None


def lrs_of(section: dict[str, Any]) -> FloatArray:
    """The rates of update 1 to the horizon of a `piecewise` section."""
    words = [f"{key}={value}" for key, value in section.items() if key != "name"]
    (shown,) = look_at(["piecewise"], (), words)
    return shown.lrs()


def _search(fit: Fit, updates: int, warmup: int, lowest: float) -> FloatArray:
    """Multipliers at `PLACES`."""
    stride = max(updates / _FINEST, 1.0)
    coarse = _in_strides(fit, stride)
    total, rise = round(updates / stride), round(warmup / stride)
    bottom, size = np.log(lowest), len(PLACES) - 1
    steps = -np.diff(np.eye(size), axis=0)

    def loss(logs: FloatArray) -> float:
        rates = np.interp(np.arange(1, total + 1), *_knots(total, rise, np.concatenate([[1.0], np.exp(logs)])))
        return float(coarse.losses(track(rates, max(rise, 1), np.array([total])))[0])

    searches = [
        minimize(
            loss,
            np.log(np.interp(PLACES[1:], [start, 1.0], [1.0, lowest])),
            method="SLSQP",
            bounds=[(bottom, 0.0)] * size,
            constraints={"type": "ineq", "fun": lambda logs: steps @ logs, "jac": lambda logs: steps},
            options={"maxiter": 200, "ftol": 1e-7},
        )
        for start in _FALL_STARTS
    ]
    best = min(searches, key=lambda found: float(found.fun))
    falling: FloatArray = np.minimum.accumulate(np.clip(np.exp(best.x), lowest, 1.0))
    return np.concatenate([[1.0], falling])


def _in_strides(fit: Fit, stride: float) -> Fit:
    """The same law for a run whose every update stands for `stride` of them: areas are that much larger."""
    base, scale, brought = fit.weights
    alpha, log_c, beta = fit.exponents
    weights = np.array([base, scale * stride**-alpha, brought])
    return Fit(fit.law, weights, np.array([alpha, log_c + np.log(stride), beta]))


def _knots(updates: int, warmup: int, levels: FloatArray) -> tuple[IntArray, FloatArray]:
    """Updates and multipliers of the knots, those of the warm-up first."""
    places = np.round(warmup + np.array(PLACES) * (updates - warmup)).astype(np.int64)
    if warmup == 0:
        return places, levels
    return np.concatenate([[0], places]), np.concatenate([[0.0], levels])


def _section(peak: float, updates: int, warmup: int, levels: FloatArray) -> dict[str, Any]:
    places, multipliers = _knots(updates, warmup, levels)
    return {
        "name": "piecewise",
        "peak": peak,
        "horizon": f"{updates} steps",
        "warmup": 0,
        "floor": 0.0,
        "knots": [
            [f"{place} steps", round(level, 6)] for place, level in zip(places, multipliers.tolist(), strict=True)
        ],
    }
