"""Which shapes fall along one formula?

x is progress after the warm-up, 0 at its end and 1 at the horizon; m the floor; f the multiplier of the peak. Where
only g is given, f = m + (1 - m) g. Lengths are written with a unit ("10%", "500 steps", "2B tokens"); a percentage is
of the horizon, and `auto` is the length of the warm-up.
"""

import numpy as np

from llmtrain.errors import ScheduleError
from llmtrain.schedules.exact import FloatArray, half_cosine_wave, power_of, to_power
from llmtrain.schedules.registry import Progress, Units, register_schedule


def wanted_above_zero(**values: float) -> None:
    """Raise ScheduleError for the first of `values` that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ScheduleError(f"schedule.{name} is {value:g}, wanted above 0")


@register_schedule("constant", ends="open")
def constant(at: Progress) -> FloatArray:
    """f = 1 to the end and after it; the floor plays no part. The baseline, and the trunk of WSD."""
    return np.ones_like(at.t)


@register_schedule("linear")
def linear(at: Progress) -> FloatArray:
    """g = 1 - x. Defazio 2023, arXiv:2310.07831 (theory); Bergsma 2025, arXiv:2502.15938 (to zero, for LLMs)."""
    return 1.0 - at.x


@register_schedule("cosine")
def cosine(at: Progress, *, exponent: float = 1.0, theta: float = 1.0) -> FloatArray:
    """g = [(1 + cos(pi x**theta)) / 2] ** exponent. Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.

    exponent: above 1 falls earlier (optax). theta: above 1 holds the peak longer (Zhang 2020, arXiv:2004.05909).
    """
    wanted_above_zero(exponent=exponent, theta=theta)
    return to_power(half_cosine_wave(to_power(at.x, theta)), exponent)


@register_schedule("half_cosine")
def half_cosine(at: Progress) -> FloatArray:
    """g = 1 + cos(pi (1 + x) / 2): the second half of a cosine wave alone, steep first and flat at the end.

    OLMo-core has it too; what it calls the peak is that of the whole wave, twice the peak meant here.
    """
    return np.where(at.t == 0, 1.0, 2.0 * half_cosine_wave(0.5 + 0.5 * at.x))


@register_schedule("hybrid")
def hybrid(at: Progress, *, weight: float = 0.5) -> FloatArray:
    """g = weight * cosine + (1 - weight) * linear. weight: share of the cosine, 0 to 1."""
    if not 0 <= weight <= 1:
        raise ScheduleError(f"schedule.weight is {weight:g}, wanted 0 (linear) to 1 (cosine)")
    return weight * half_cosine_wave(at.x) + (1.0 - weight) * (1.0 - at.x)


@register_schedule("cosine_linear")
def cosine_linear(at: Progress, *, tail: Units = "10%", cosine_floor: float = 0.1) -> FloatArray:
    """A cosine towards `cosine_floor` at the horizon, left `tail` before it for a straight line to g = 0.

    c(x) = a + (1 - a) (1 + cos pi x) / 2 up to x = 1 - d, then c(1 - d) (1 - x) / d. OLMo-core's cosine with linear
    decay (OLMo 2, Walsh 2024, arXiv:2501.00656). tail: length d of the line. cosine_floor: a, a multiplier, 0 to 1.
    """
    if not 0 <= cosine_floor <= 1:
        raise ScheduleError(f"schedule.cosine_floor is {cosine_floor:g}, wanted 0 to 1")
    start = at.span - min(tail, at.span)
    wave = cosine_floor + (1.0 - cosine_floor) * half_cosine_wave(np.minimum(at.t, start) / at.span)
    closing: FloatArray = np.minimum((at.span - at.t) / max(at.span - start, 1), 1.0)
    return wave * closing


@register_schedule("polynomial")
def polynomial(at: Progress, *, power: float = 2.0) -> FloatArray:
    """g = (1 - x) ** power. power: above 0; 2 beta - 1 in Li 2026, arXiv:2602.06797."""
    wanted_above_zero(power=power)
    return to_power(1.0 - at.x, power)


@register_schedule("exponential", absolute=True)
def exponential(at: Progress) -> FloatArray:
    """f = m ** x: the same factor every update, down to the floor m, which must be above 0."""
    if at.floor == 0:
        raise ScheduleError("schedule exponential multiplies down to its floor: write a floor above 0, such as 0.01")
    return power_of(at.floor, at.x)


@register_schedule("inverse_sqrt", ends="open")
def inverse_sqrt(at: Progress, *, timescale: Units = "auto") -> FloatArray:
    """g = sqrt(s / (s + t)), t past the warm-up W; with s = W this is sqrt(W / k). It does not end at the floor.

    Vaswani 2017, arXiv:1706.03762; timescale s: Zhai 2021, arXiv:2106.04560. timescale: length, `auto` is the warm-up.
    """
    wanted_above_zero(timescale=timescale)
    shrunk: FloatArray = timescale / (timescale + at.t)
    return np.sqrt(shrunk)


@register_schedule("power", absolute=True, ends="open")
def power_law(at: Progress, *, exponent: float = 0.51, knee: Units = "auto", tail: Units = "10%") -> FloatArray:
    """f = min(1, (p / knee) ** -exponent) at position p from the start of the run, then a straight line to m.

    Shen 2024, arXiv:2408.13359: min(peak, a B n**b) with b = -exponent has its knee at n = (peak / a B) ** (1 / b).
    exponent: above 0. knee: length from the start after which the law falls below the peak, `auto` is the end of the
    warm-up. tail: length of the closing line; 0 for none, then f ends where the law is, at least at m.
    """
    wanted_above_zero(exponent=exponent, knee=knee)
    if knee < at.warmup:
        raise ScheduleError(f"schedule.knee ({knee}) lies inside the warm-up ({at.warmup})")
    start = at.span - min(tail, at.span)
    reached: FloatArray = (np.minimum(at.t, start) + at.warmup) / knee
    law = to_power(np.maximum(reached, 1.0), -exponent)
    law = at.floor + (1.0 - at.floor) * law
    if start == at.span:
        return law
    share = np.minimum((at.span - at.t) / (at.span - start), 1.0)
    closing: FloatArray = at.floor + (law - at.floor) * share
    return closing
