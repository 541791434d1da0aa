"""How does the learning rate rise at the start of a run?

A warm-up gives 0 at position 0 and 1 at position W. `warmup_start` s lays it between s and 1, so `linear` is
s + (1 - s) k / W, and the curve that follows starts at exactly 1 at k = W.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from llmtrain.errors import ScheduleError, did_you_mean
from llmtrain.schedules.exact import FloatArray, each, half_cosine_wave, power_of

_EXPONENTIAL_END = 1 - math.exp(-2)

_RISES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "none": np.ones_like,
    "linear": lambda x: x,
    "cosine": lambda x: 1.0 - half_cosine_wave(x),  # half a cosine wave, flat at both ends; torch's OneCycleLR
    "1-sqrt": lambda x: 1.0 - np.sqrt(1.0 - x),  # slow first, steep last; transformers' wsd
    # Ma & Yarats 2019, arXiv:1910.04209: 1 - exp(-k / tau) with tau = W / 2, their pairing with a linear warm-up of W,
    # scaled so that it arrives at 1
    "exponential": lambda x: each(lambda v: (1 - math.exp(-2 * v)) / _EXPONENTIAL_END, x),
}
WARMUPS = (*_RISES, "geometric", "log")


def rise(shape: str, start: float, position: FloatArray, length: float) -> FloatArray:
    """Multipliers at `position` (0 to `length`, in units of the clock) of the warm-up `shape` from `start` to 1.

    A warm-up of no length is at its end, where a convention asks for it at all.
    """
    if length == 0:
        return np.ones_like(position)
    if shape == "geometric":  # equal factors: start ** (1 - x), for learning-rate range tests
        return power_of(start, 1.0 - position / length)
    if shape == "log":  # log(k) / log(W): DeepSpeed's default
        whole = math.log(length) or 1.0
        value = each(lambda v: min(math.log(max(v, 1.0)) / whole, 1.0), position)
    else:
        value = _RISES[shape](position / length)
    return start + (1.0 - start) * value


def check_warmup(shape: Any, start: Any, unit: str) -> None:
    """Raise ScheduleError where `warmup_shape` or `warmup_start` cannot be."""
    if shape not in WARMUPS:
        raise ScheduleError(f'unknown schedule.warmup_shape "{shape}"{did_you_mean(str(shape), WARMUPS)}')
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start <= 1:
        raise ScheduleError(f"schedule.warmup_start is {start!r}, wanted a multiplier of the peak from 0 to 1")
    if shape == "geometric" and start == 0:
        raise ScheduleError("schedule.warmup_shape geometric multiplies: write a warmup_start above 0, such as 1e-3")
    if shape == "log" and unit == "tokens":
        raise ScheduleError("schedule.warmup_shape log counts updates: write schedule.horizon in steps")
