"""Loss curves whose law is known: slow, obvious formulas, and SGD on a regression whose expectation is exact."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.study.law.curves import LossCurve
from llmtrain.study.schedule_shown import look_at

TRUTH = {"L0": 2.5, "A": 1.0, "alpha": 0.45, "B": 0.3, "C": 10.0, "beta": 0.6}
PEAK = 1e-3


def rates(name: str, updates: int, warmup: int = 100, peak: float = PEAK, floor: float = 0.1) -> FloatArray:
    """The learning rates of a registered schedule."""
    words = [f"peak={peak}", f"horizon={updates} steps", f"warmup={warmup} steps", f"floor={floor}"]
    return look_at([name], (), words)[0].lrs()


def multi_power(lrs: FloatArray, warmup: int, places: Sequence[int] | IntArray, truth: dict[str, float]) -> FloatArray:
    """The multi-power law, every update a drop of its own."""
    f = lrs / lrs.max()
    area = np.cumsum(f) / 1000
    ks = np.arange(warmup + 1, len(f) + 1)
    drops = f[ks - 2] - f[ks - 1]
    losses = []
    for t in places:
        x = f[ks - 1] ** -0.5 * np.maximum(area[t - 1] - area[ks - 2], 0.0)
        gained = np.sum(drops * (1 - (1 + truth["C"] * x) ** -truth["beta"]))
        losses.append(truth["L0"] + truth["A"] * area[t - 1] ** -truth["alpha"] - truth["B"] * gained)
    return np.array(losses)


def momentum_law(lrs: FloatArray, warmup: int, places: IntArray, decay: float, truth: dict[str, float]) -> FloatArray:
    """The momentum law, one update after the other."""
    f = lrs / lrs.max()
    losses, area, slow, gained = [], 0.0, 0.0, 0.0
    for k in range(1, len(f) + 1):
        area += f[k - 1] / 1000
        slow = decay * slow + (f[k - 2] - f[k - 1] if k > warmup else 0.0)
        gained += slow / 1000
        losses.append(truth["L0"] + truth["A"] * area ** -truth["alpha"] - truth["B"] * gained)
    return np.array(losses)[places - 1]


def known_curve(name: str, updates: int = 2000, every: int = 25, noise: float = 0.0) -> LossCurve:
    """A run of the schedule `name` in a world where the multi-power law holds, with noise of its own."""
    lrs, places = rates(name, updates), np.arange(100 + every, updates + 1, every)
    losses = multi_power(lrs, 100, places, TRUTH)
    losses += noise * np.random.default_rng(len(name)).standard_normal(len(losses))
    return LossCurve(name, lrs, 100, places, losses, {})


def write_csv(curve: LossCurve, folder: Path) -> Path:
    """The curve as a file with a row at the end of the warm-up and one for every loss."""
    path = folder / f"{curve.name.replace(':', '_').replace('=', '_')}.csv"
    steps, losses = [curve.warmup, *curve.steps.tolist()], [9.0, *curve.losses.tolist()]
    rows = [f"{step},{float(curve.lrs[step - 1])!r},{loss!r}" for step, loss in zip(steps, losses, strict=True)]
    path.write_text("\n".join(["step,lr,loss", *rows]) + "\n")
    return path


def regression(lrs: FloatArray, every: int) -> FloatArray:
    """Expected loss of one-pass SGD on a linear regression, (T, runs) rates -> (T // every, runs) losses.

    Features have the spectrum j**-1.5, the target has j**-1.6 of its size in direction j, label noise 1, batch 16. The
    second moments of the error follow a recursion of their own, so that nothing is sampled.
    """
    spectrum = np.arange(1, 3001.0) ** -1.5
    moments = np.repeat((np.arange(1, 3001.0) ** -1.6 / spectrum)[None], lrs.shape[1], axis=0)
    losses = []
    for k, rate in enumerate(lrs, start=1):
        noise = moments @ spectrum + 1.0
        moments *= (1 - rate[:, None] * spectrum) ** 2
        moments += (rate**2 / 16 * noise)[:, None] * spectrum
        if k % every == 0:
            losses.append((moments @ spectrum + 1.0) / 2)
    return np.array(losses)
