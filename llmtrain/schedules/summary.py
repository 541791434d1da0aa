"""What does a schedule amount to, before a run is paid for?

Sums are over the updates that run, 1 to `updates` (the horizon, or an earlier stop), in multiples of the peak where not
said otherwise. eta is a learning rate, lambda the weight decay, e a multiplier.
"""

import math
from dataclasses import dataclass

import numpy as np

from llmtrain.config import ScheduleConfig
from llmtrain.schedules.exact import FloatArray
from llmtrain.schedules.schedule import Schedule, plan
from llmtrain.units import Length


@dataclass(frozen=True)
class Summary:
    """The numbers of one schedule."""

    updates: int
    first_lrs: tuple[float, ...]  # of the first three updates
    last_lrs: tuple[float, ...]  # of the last three
    peak_lr: float  # the largest that is used
    peak_update: int  # the first update that uses it
    area: float  # sum of the learning rates
    mean_multiplier: float
    decay_share: float  # of the area, after the last update at the largest rate
    sum_of_squares: float  # of the learning rates
    averaging_window: float | None  # updates, 1 / (eta lambda) at the end; None where that is without end
    effective_updates: float | None  # (sum c)**2 / sum c**2 of the EMA coefficients; None without weight decay
    bound_ratio: float  # convex bound over that of linear to zero with the same warm-up
    peak_ratio: float  # the peak which that bound favours, over linear's
    warnings: tuple[str, ...]


def summarize(schedule: Schedule, weight_decay: float = 0.1, stop_at: int | None = None) -> Summary:
    """The numbers of `schedule` for a run that ends at update `stop_at` (its horizon where None)."""
    updates = schedule.total_updates if stop_at is None else stop_at
    e = schedule.multipliers(np.arange(1, updates + 1))
    lrs = schedule.peak * e
    last_at_top = int(np.flatnonzero(e == e.max())[-1])
    coefficients = ema_coefficients(lrs, weight_decay)
    last = float(lrs[-1]) * weight_decay
    bound, best_peak = convex_bound(e)
    linear_bound, linear_peak = convex_bound(_linear_to_zero(schedule, updates))
    squares = float(np.sum(coefficients**2))
    return Summary(
        updates=updates,
        first_lrs=tuple(lrs[:3].tolist()),
        last_lrs=tuple(lrs[-3:].tolist()),
        peak_lr=float(lrs.max()),
        peak_update=int(np.argmax(e)) + 1,
        area=float(lrs.sum()),
        mean_multiplier=float(e.mean()),
        decay_share=float(e[last_at_top + 1 :].sum() / e.sum()) if e.any() else 0.0,
        sum_of_squares=float(np.sum(lrs**2)),
        averaging_window=1 / last if last > 0 else None,
        effective_updates=float(coefficients.sum()) ** 2 / squares if squares > 0 else None,
        bound_ratio=bound / linear_bound,
        peak_ratio=best_peak / linear_peak,
        warnings=tuple(_warnings(schedule, e, updates)),
    )


def ema_coefficients(lrs: FloatArray, weight_decay: float) -> FloatArray:
    """c_i = eta_i lambda * prod over j > i of (1 - eta_j lambda): how much of update i the final weights hold.

    AdamW's weights are such an average of its updates (Wang & Aitchison 2024, arXiv:2405.13698). The coefficients and
    the share of the initial weights, the product over all j, add up to 1.
    """
    rates = lrs * weight_decay
    kept = np.cumprod((1.0 - rates)[::-1])[::-1]
    coefficients: FloatArray = rates * np.append(kept[1:], 1.0)
    return coefficients


def convex_bound(e: FloatArray) -> tuple[float, float]:
    """The last-iterate bound of SGD at its best peak, and that peak, for distance 1 and gradient norm 1.

    Defazio 2023, arXiv:2310.07831; Schaipp 2025, arXiv:2501.18965. With sums from k on to the last update,
    bound = 1 / (2 g sum e) + g B, B = sum e**2 / (2 sum e) + 1/2 sum over k < T of e_k sum_k e**2 / (sum_k e sum_k+1 e)
    at peak g.
    A worst case over convex problems: it ranks shapes and centres a sweep of peaks, and is no loss difference.
    Updates at 0 after the last positive one do not count; without any positive one both numbers are infinite.
    """
    positive = np.flatnonzero(e > 0)
    if not positive.size:
        return math.inf, math.inf
    e = e[: positive[-1] + 1]
    tail = np.cumsum(e[::-1])[::-1]
    squares = np.cumsum((e * e)[::-1])[::-1]
    noise = squares[0] / (2 * tail[0]) + 0.5 * float(np.sum(e[:-1] * squares[:-1] / (tail[:-1] * tail[1:])))
    distance = 1 / (2 * tail[0])
    return 2 * math.sqrt(distance * noise), math.sqrt(distance / noise)


def _linear_to_zero(schedule: Schedule, updates: int) -> FloatArray:
    warmup = Length(min(schedule.warmup_updates, updates), "steps")
    linear = ScheduleConfig(name="linear", peak=1.0, warmup=warmup, horizon=Length(updates, "steps"), floor=0.0)
    return plan(linear, tokens_per_update=1).multipliers(np.arange(1, updates + 1))


def _warnings(schedule: Schedule, e: FloatArray, updates: int) -> list[str]:
    found = []
    horizon = schedule.total_updates
    if updates > horizon:
        found.append(f"the decay ends at update {horizon}, the run at {updates}")
    if updates < horizon:
        found.append(f"the run ends at update {updates}, the decay at {horizon}: its last loss is not an annealed one")
    if schedule.anneals and updates >= horizon > schedule.warmup_updates:
        early = int(np.flatnonzero(e != e[horizon - 1])[-1]) + 2 if np.any(e != e[horizon - 1]) else 1
        if e[horizon - 1] < e.max() and horizon - early > 0.01 * horizon + 1:
            found.append(f"the final value is reached at update {early} already, of {horizon}")
    if schedule.warmup_updates > 0.1 * horizon:
        found.append(f"the warm-up takes {schedule.warmup_updates / horizon:.0%} of the horizon, more than 10 %")
    if e.max() < 1:
        found.append(f"the peak is never reached: the largest multiplier is {e.max():.4g}")
    return found
