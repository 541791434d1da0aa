"""How are cosines and powers computed so that an array and a single number agree to the last bit?

NumPy's `+ - * / sqrt` are correctly rounded whatever the length of the array. Its transcendental functions are not, and
may take another path for the last few elements of a SIMD register. So those go through `math`, one element at a time;
a million of them take about 0.1 s.
"""

import math
from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def each(function: Callable[[float], float], x: FloatArray) -> FloatArray:
    """`function` of every element."""
    return np.fromiter(map(function, x.tolist()), np.float64, x.size)


def half_cosine_wave(x: FloatArray) -> FloatArray:
    """(1 + cos(pi x)) / 2: falls from exactly 1 at x = 0 to exactly 0 at x = 1."""
    value = np.where(x < 1, 1.0, 0.0)
    inside = (x > 0) & (x < 1)
    value[inside] = 0.5 * (1.0 + each(math.cos, math.pi * x[inside]))
    return value


def to_power(x: FloatArray, exponent: float) -> FloatArray:
    """x ** exponent; the array itself where the exponent is 1."""
    return x if exponent == 1 else np.fromiter(map(math.pow, x.tolist(), repeat(exponent)), np.float64, x.size)


def power_of(base: float, x: FloatArray) -> FloatArray:
    """base ** x."""
    return np.fromiter(map(math.pow, repeat(base), x.tolist()), np.float64, x.size)


def interpolate(x: FloatArray, knots_x: Sequence[float], knots_y: Sequence[float], hold: bool = False) -> FloatArray:
    """Straight lines between knots, or the value of the knot before; the end values outside. `knots_x` ascend."""
    xs, ys = np.asarray(knots_x, np.float64), np.asarray(knots_y, np.float64)
    below = np.clip(np.searchsorted(xs, x, side="right") - 1, 0, len(xs) - 1)
    if hold or len(xs) == 1:
        return ys[below]
    below = np.minimum(below, len(xs) - 2)
    share = np.clip((x - xs[below]) / (xs[below + 1] - xs[below]), 0.0, 1.0)
    return np.where(share == 1, ys[below + 1], ys[below] + (ys[below + 1] - ys[below]) * share)
