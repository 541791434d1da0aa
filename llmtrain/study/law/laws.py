"""Which loss does a learning-rate schedule lead to? Four laws, each a sum of columns with weights that are 0 or more.

Learning rates are multiples f of the peak. S(t) is the area under them from update 1 to t, the warm-up included, in
thousands of peak-steps. A drop is d(k) = f(k-1) - f(k), after the warm-up alone; S_k(t) is the area of updates k to t.

    mpl       L0 + A S(t)^-alpha - B sum d(k) G(f(k)^-1/2 S_k(t)),  G(x) = 1 - (1 + C x)^-beta
    momentum  L0 + A S(t)^-alpha - B M(t),  M = sum of m in thousands,  m(k) = lambda m(k-1) + d(k)
    time      L0 + A t^-alpha, t in thousands of updates: blind to the learning rate
    area      L0 + A S(t)^-alpha: blind to the decay

mpl: Luo 2025, arXiv:2503.12811, eq. 1, its exponent gamma held at 1/2, because curves do not tell it from beta.
momentum: Tissue 2024, arXiv:2408.11029. The other two are what a law must beat.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter

from llmtrain.schedules.exact import FloatArray, IntArray

GAMMA = 0.5
LAMBDAS = (0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)
SEGMENTS = 400  # into which the drops of a curve are gathered, unless it has more places: 1e-5 nats from exact
_LOWEST = 1e-6  # of the peak; keeps f^-1/2 finite where a schedule ends at 0
_SAME = 1e-9  # relative difference of rates that count as equal


@dataclass(frozen=True)
class Track:
    """A schedule as the laws see it after `updates`. n places, T updates, q pairs of a place and drops before it.

    Pairs are ordered by place; the first places may have none.
    """

    updates: IntArray  # (n,) ascending, all after the warm-up
    multipliers: FloatArray  # (T,) of the fitted peak, from update 1
    warmup: int  # the update at which it ends, 1 or more
    area: FloatArray  # (n,) S
    first: IntArray  # of each place that has pairs, the first of them
    drop: FloatArray  # (q,) the sum of d(k) over a segment of updates
    reach: FloatArray  # (q,) f(k)^-1/2 S_k(t)

    def total(self, values: FloatArray) -> FloatArray:
        """Sum over the drops before each place of drop times value, (q,) -> (n,)."""
        sums = np.zeros(len(self.updates))
        if len(self.first):
            sums[-len(self.first) :] = np.add.reduceat(self.drop * values, self.first)
        return sums


@dataclass(frozen=True)
class Columns:
    """A law at given exponents: its loss is `values` times the weights."""

    values: FloatArray  # (n, p), the first column 1
    slopes: list[tuple[int, FloatArray]]  # for each exponent: the column it moves, and that column's derivative, (n,)


@dataclass(frozen=True)
class Law:
    """One of the laws. Weights multiply columns; exponents are inside of them."""

    name: str
    weights: tuple[str, ...]
    exponents: tuple[str, ...]
    lower: tuple[float, ...]  # of the exponents
    upper: tuple[float, ...]
    starts: tuple[tuple[float, ...], ...]
    columns: Callable[[Track, FloatArray], Columns]


def first_peak(lrs: FloatArray) -> int:
    """The first update at the highest rate, where the warm-up ends."""
    return int(np.argmax(lrs >= lrs.max() * (1 - _SAME))) + 1


def track(multipliers: FloatArray, warmup: int, updates: IntArray, segments: int = SEGMENTS) -> Track:
    """Gather what the laws need of the rates of updates 1 to T, seen after `updates`."""
    area = np.cumsum(multipliers) / 1000
    fall = drops(multipliers, warmup)
    share = np.abs(fall)
    starts = _segment_starts(share, updates, segments)
    size = np.add.reduceat(share, starts)
    starts, size = starts[size > 0], size[size > 0]
    total = np.add.reduceat(fall, starts) if len(starts) else size
    before = np.add.reduceat(share * (area - multipliers / 1000), starts) / size if len(starts) else size
    level = np.add.reduceat(share * multipliers, starts) / size if len(starts) else size
    place, segment = np.nonzero(updates[:, None] > starts)  # no segment straddles a place
    places = area[updates - 1]
    reach = (places[place] - before[segment]) * np.maximum(level, _LOWEST)[segment] ** -GAMMA
    first = np.flatnonzero(np.diff(place, prepend=-1))
    return Track(updates, multipliers, warmup, places, first, total[segment], reach)


def drops(multipliers: FloatArray, warmup: int) -> FloatArray:
    """d(k) of updates 1 to T, 0 up to the end of the warm-up."""
    fall = np.zeros_like(multipliers)
    fall[warmup:] = -np.diff(multipliers)[warmup - 1 :]
    fall[np.abs(fall) < _SAME] = 0.0
    return fall


def mpl() -> Law:
    """The multi-power law with gamma = 1/2: six parameters."""
    return Law(
        name="mpl",
        weights=("L0", "A", "B"),
        exponents=("alpha", "log_C", "beta"),
        lower=(0.05, -4.0, 0.05),
        upper=(2.0, 9.0, 3.0),
        starts=tuple((a, c, b) for a in (0.3, 0.7) for c in (-1.0, 1.5, 4.0) for b in (0.2, 0.5, 1.0)),
        columns=_mpl_columns,
    )


def momentum(decay: float) -> Law:
    """The momentum law at one lambda."""

    def columns(seen: Track, exponents: FloatArray) -> Columns:
        return _with_gain(_power(seen.area, exponents[0]), momentum_sum(seen, decay))

    return Law("momentum", ("L0", "A", "B"), ("alpha",), (0.05,), (2.0,), ((0.5,),), columns)


def time_only() -> Law:
    """The power law in updates."""
    return Law(
        "time", ("L0", "A"), ("alpha",), (0.05,), (2.0,), ((0.5,),), lambda seen, x: _power(seen.updates / 1000, x[0])
    )


def area_only() -> Law:
    """The power law in area."""
    return Law("area", ("L0", "A"), ("alpha",), (0.05,), (2.0,), ((0.5,),), lambda seen, x: _power(seen.area, x[0]))


def momentum_sum(seen: Track, decay: float) -> FloatArray:
    """M of the momentum law at the places of a track."""
    total: FloatArray = np.cumsum(lfilter([1.0], [1.0, -decay], drops(seen.multipliers, seen.warmup))) / 1000
    return total[seen.updates - 1]


def _mpl_columns(seen: Track, exponents: FloatArray) -> Columns:
    alpha, log_c, beta = exponents
    scaled = np.exp(log_c) * seen.reach
    log = np.log1p(scaled)
    left = np.exp(-beta * log)
    columns = _with_gain(_power(seen.area, alpha), seen.total(1.0 - left))
    by_log_c = seen.total(beta * left * scaled / (1.0 + scaled))
    by_beta = seen.total(left * log)
    return Columns(columns.values, [*columns.slopes, (2, -by_log_c), (2, -by_beta)])


def _power(x: FloatArray, exponent: float) -> Columns:
    fallen = x**-exponent
    return Columns(np.column_stack([np.ones_like(x), fallen]), [(1, -np.log(x) * fallen)])


def _with_gain(columns: Columns, gained: FloatArray) -> Columns:
    return Columns(np.column_stack([columns.values, -gained]), columns.slopes)


def _segment_starts(share: FloatArray, updates: IntArray, segments: int) -> IntArray:
    """Indices at which segments of drops start: at each place, and between places at even shares of the whole fall."""
    so_far = np.cumsum(share)
    wanted = max(segments - len(updates), 1)
    quantiles = np.searchsorted(so_far, np.linspace(0, so_far[-1], wanted, endpoint=False), side="right")
    starts = np.unique(np.concatenate([[0], updates, quantiles]))
    return starts[starts < len(share)]
