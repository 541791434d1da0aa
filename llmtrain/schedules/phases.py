"""Which shapes hold, drop, fall and rise in phases?

Symbols as in `llmtrain.schedules.decays`: t is the position after the warm-up W, p = W + t the position from the start
of the run, f the multiplier of the peak, m the floor. A level that holds "until p" still holds at p itself.
"""

from typing import Literal

import numpy as np

from llmtrain.errors import ScheduleError
from llmtrain.schedules.exact import FloatArray, half_cosine_wave, power_of
from llmtrain.schedules.registry import Progress, Units, UnitsList, register_schedule

Cooldown = Literal["linear", "1-sqrt", "cosine", "mirror-cosine", "square", "exponential", "harmonic", "half-life"]


def cooldown_curve(shape: str, y: FloatArray, floor: float, start: float = 1.0) -> FloatArray:
    """From exactly `start` at y = 0 to exactly `floor` at y = 1.

    linear 1-y; 1-sqrt 1-sqrt(y) (Hagele 2024, arXiv:2405.18392); cosine; mirror-cosine 2(1-y) - cosine; square 1-y**2;
    half-life 2 * 0.5**y - 1 (Megatron calls it exponential): these lie between start and floor. exponential, equal
    factors, and harmonic, equal steps of 1/f (Wen 2024, arXiv:2410.05192), need a floor above 0.
    """
    if shape in ("exponential", "harmonic"):
        if floor == 0:
            raise ScheduleError(
                f"a cooldown of shape {shape} needs a floor above 0, such as 0.01: to 0 it drops at once"
            )
        if shape == "exponential":
            value = start * power_of(floor / start, y)
        else:
            value = 1.0 / (y / floor + (1.0 - y) / start)
        return np.where(y == 0, start, np.where(y == 1, floor, value))
    if shape == "linear":
        fall = 1.0 - y
    elif shape == "1-sqrt":
        fall = 1.0 - np.sqrt(y)
    elif shape == "cosine":
        fall = half_cosine_wave(y)
    elif shape == "mirror-cosine":
        fall = 2.0 * (1.0 - y) - half_cosine_wave(y)
    elif shape == "square":
        fall = 1.0 - y * y
    else:
        assert shape == "half-life", shape
        fall = 2.0 * power_of(0.5, y) - 1.0
    return floor + (start - floor) * fall


def wanted_level(name: str, level: float) -> None:
    """Raise ScheduleError unless `level` is a multiplier from 0 to 1."""
    if not 0 <= level <= 1:
        raise ScheduleError(f"schedule.{name} is {level:g}, wanted a multiplier of the peak from 0 to 1")


def no_warmup(at: Progress, name: str) -> None:
    """Raise ScheduleError where a warm-up stands before a shape that draws its own."""
    if at.warmup:
        raise ScheduleError(f"schedule {name} draws its own warm-up: leave schedule.warmup out")


@register_schedule("step", ends="level")
def step(at: Progress, *, every: Units = "30%", factor: float = 0.1) -> FloatArray:
    """g = factor ** n after n whole lengths of `every` past the warm-up. torch's StepLR. It ends at its last level.

    every: length. factor: of each drop, 0 to 1.
    """
    wanted_level("factor", factor)
    if every < 1:
        raise ScheduleError("schedule.every is 0, wanted a length")
    return power_of(factor, np.maximum(np.ceil(at.t / every) - 1.0, 0.0))


@register_schedule("multistep", ends="level")
def multistep(
    at: Progress,
    *,
    drops: UnitsList = ("80%", "90%"),
    levels: list[float] = [0.316, 0.1],  # noqa: B006
) -> FloatArray:
    """g = 1 until p = drops[0], then levels[0] until drops[1], and so on; it ends at its last level.

    The defaults are DeepSeek-LLM's (arXiv:2401.02954). drops: lengths from the start of the run, rising. levels: one
    multiplier for each, never rising.
    """
    if len(drops) != len(levels) or sorted(drops) != drops or sorted(levels, reverse=True) != levels:
        raise ScheduleError(
            f"schedule: drops {drops} must rise, and have one of the levels {levels}, which must not rise"
        )
    for level in levels:
        wanted_level("levels", level)
    if drops and drops[0] < at.warmup:
        raise ScheduleError(f"schedule.drops begin at {drops[0]}, inside the warm-up of {at.warmup}")
    passed = np.searchsorted(np.asarray(drops, np.float64), at.warmup + at.t, side="left")
    return np.asarray([1.0, *levels])[passed]


@register_schedule("one_cycle", absolute=True, cyclic=True)
def one_cycle(
    at: Progress, *, rise: Units = "30%", start: float = 0.04, anneal: Literal["cosine", "linear"] = "cosine"
) -> FloatArray:
    """Half a cosine wave (or a line) from `start` up to 1 at `rise`, then down to m at the horizon.

    Smith & Topin 2017, arXiv:1708.07120; torch's OneCycleLR has start 1/25 and m = start/1e4. It has no other warm-up.
    rise: length; the top comes before the horizon. start: multiplier. anneal: the curve of both.
    """
    no_warmup(at, "one_cycle")
    wanted_level("start", start)
    top = min(rise, at.span - 1)
    up = cooldown_curve(anneal, 1.0 - np.minimum(at.t / max(top, 1), 1.0), start)
    down = cooldown_curve(anneal, np.maximum(at.t - top, 0.0) / (at.span - top), at.floor)
    return np.where(at.t < top, up, down)


@register_schedule("sgdr", cyclic=True)
def sgdr(at: Progress, *, cycles: int = 4, lengthen: float = 1.0, shrink: float = 1.0) -> FloatArray:
    """g = shrink**j (1 + cos pi x_j) / 2 in cycle j, which restarts at x_j = 0; the floor is met at the horizon alone.

    Loshchilov & Hutter 2017, arXiv:1608.03983. cycles: how many fit into the run. lengthen: each cycle's length over
    the one before (their T_mult). shrink: each cycle's peak over the one before, 0 to 1.
    """
    wanted_level("shrink", shrink)
    if cycles < 1 or not 0 < lengthen < 1e6:
        raise ScheduleError(f"schedule: cycles is {cycles} and lengthen {lengthen:g}, wanted at least 1 and above 0")
    lengths = [lengthen**j for j in range(cycles)]
    edges = np.array([at.span * (sum(lengths[:j]) / sum(lengths)) for j in range(cycles + 1)])
    cycle = np.minimum(np.searchsorted(edges, at.t, side="right") - 1, cycles - 1)
    x = np.minimum((at.t - edges[cycle]) / (edges[cycle + 1] - edges[cycle]), 1.0)
    return np.array([shrink**j for j in range(cycles)])[cycle] * half_cosine_wave(x)


@register_schedule("wsd", absolute=True)
def wsd(at: Progress, *, decay: Units = "20%", cooldown: Cooldown = "linear") -> FloatArray:
    """Warm-up, stable, decay (also called trapezoid): f = 1 until `decay` before the horizon, then the cooldown to m.

    Zhai 2021, arXiv:2106.04560; Hu 2024, arXiv:2404.06395; Hagele 2024, arXiv:2405.18392. decay: length of the
    cooldown. cooldown: its shape; see `cooldown_curve`.
    """
    if decay > at.span:
        raise ScheduleError(
            f"schedule.decay is {decay} of the {at.span} left after the warm-up of {at.warmup}: shorten one of them"
        )
    if decay == 0:
        return np.where(at.t < at.span, 1.0, at.floor)
    return cooldown_curve(cooldown, np.maximum(at.t - (at.span - decay), 0.0) / decay, at.floor)


@register_schedule("wsd_s", absolute=True, cyclic=True)
def wsd_s(
    at: Progress,
    *,
    ends: UnitsList = (),
    cycles: int = 4,
    decay_share: float = 0.1,
    cooldown: Cooldown = "linear",
) -> FloatArray:
    """Stable and decay, again and again, each going on from the decayed weights and jumping back to the peak.

    Wen 2024, arXiv:2410.05192. Every cycle's last update is at exactly m, the next one at 1. ends: lengths from the
    start of the run at which a decayed model is wanted, besides the horizon. cycles: how many equal ones where no ends
    are written. decay_share: of each cycle, above 0, to 1. cooldown: see `cooldown_curve`; the paper's is harmonic.
    """
    if not 0 < decay_share <= 1:
        raise ScheduleError(f"schedule.decay_share is {decay_share:g}, wanted a share of each cycle, above 0 to 1")
    if not ends and not 1 <= cycles <= at.span:
        raise ScheduleError(f"schedule.cycles is {cycles}, wanted 1 to the {at.span} left after the warm-up")
    inner = [end - at.warmup for end in ends] or [at.span * j // cycles for j in range(1, cycles)]
    edges = np.array([0, *inner, at.span], np.float64)
    if np.any(np.diff(edges) <= 0):
        raise ScheduleError(f"schedule.ends {ends} must rise from the end of the warm-up to before the horizon")
    cycle = np.maximum(np.searchsorted(edges, at.t, side="left") - 1, 0)
    decay = (edges[cycle + 1] - edges[cycle]) * decay_share
    y = np.maximum(1.0 - (edges[cycle + 1] - at.t) / decay, 0.0)
    return np.where(at.t == 0, 1.0, cooldown_curve(cooldown, y, at.floor))


@register_schedule("infinite", absolute=True, ends="open")
def infinite(
    at: Progress,
    *,
    cooldown: Units = "20%",
    level: float = 0.5,
    curve: Literal["cosine", "rsqrt"] = "cosine",
    anneal: Units = "0 steps",
    anneal_shape: Cooldown = "exponential",
) -> FloatArray:
    """From 1 down to `level` over `cooldown`, constant from then on, and at the end an anneal to m if one is wanted.

    Ibrahim 2024, arXiv:2403.08763; Singh 2025, arXiv:2503.02844. cooldown, anneal: lengths. level: multiplier. curve:
    cosine, or rsqrt, 1 / sqrt(1 + (1 / level**2 - 1) t / cooldown). anneal_shape: see `cooldown_curve`.
    """
    wanted_level("level", level)
    if not 0 < cooldown <= at.span - anneal or level < at.floor or (level == 0 and curve == "rsqrt"):
        raise ScheduleError(
            f"schedule infinite: cooldown ({cooldown}) and anneal ({anneal}) must fit between warm-up and horizon "
            f"({at.span}), and level {level:g} must not be below the floor {at.floor:g}"
        )
    x = np.minimum(at.t / cooldown, 1.0)
    if curve == "cosine":
        falling = level + (1.0 - level) * half_cosine_wave(x)
    else:
        falling = np.where(x == 1, level, 1.0 / np.sqrt(1.0 + (1.0 / level**2 - 1.0) * x))
    if anneal == 0:
        return falling
    y = np.maximum(at.t - (at.span - anneal), 0.0) / anneal
    return np.where(y > 0, cooldown_curve(anneal_shape, y, at.floor, level), falling)


@register_schedule("rewarm", absolute=True, cyclic=True)
def rewarm(at: Progress, *, first: Units = "50%", rise: Units = "1%", level: float = 1.0) -> FloatArray:
    """A cosine to m until p = `first`, a line up to `level` over `rise`, and a second cosine to m at the horizon.

    Continual pretraining: Gupta 2023, arXiv:2308.04014; Ibrahim 2024, arXiv:2403.08763. first: length of the old run,
    from its start. rise: length. level: multiplier of the peak that the new data begins with.
    """
    wanted_level("level", level)
    end = first - at.warmup
    if end < 1 or end + rise >= at.span or level < at.floor:
        raise ScheduleError(
            f"schedule rewarm: warm-up ({at.warmup}), first ({first}) and rise ({rise}) must follow one another, "
            f"before the horizon ({at.warmup + at.span}), and level {level:g} not be below the floor {at.floor:g}"
        )
    old = cooldown_curve("cosine", np.minimum(at.t / end, 1.0), at.floor)
    up = at.floor + (level - at.floor) * np.clip((at.t - end) / max(rise, 1), 0.0, 1.0)
    new = cooldown_curve("cosine", np.maximum(at.t - end - rise, 0.0) / (at.span - end - rise), at.floor, level)
    return np.where(at.t <= end, old, np.where(at.t < end + rise, up, new))
