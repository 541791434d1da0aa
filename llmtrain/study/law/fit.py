"""Which parameters of a law come nearest to loss curves?

Variable projection: for given exponents the best weights follow from a robust linear fit (Huber loss, weights of 0 or
more), so that only the exponents are searched, within bounds, from the best few of a law's starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls

from llmtrain.schedules.exact import FloatArray
from llmtrain.study.law.laws import LAMBDAS, Columns, Law, Track, momentum

HUBER = 1e-3  # of the mean loss: residuals beyond it count linearly
_SEARCHED = 3  # starts that are followed to their end
_AT_BOUND = 1e-3  # of the range of an exponent
_ROUNDS = 60  # of reweighting, at most


@dataclass(frozen=True)
class Fit:
    """A law with its parameters."""

    law: Law
    weights: FloatArray
    exponents: FloatArray
    constant: float | None = None  # lambda of the momentum law
    cost: float = 0.0  # Huber loss that the search ended at, in nats squared

    def losses(self, seen: Track) -> FloatArray:
        """The losses at the places of a track."""
        predicted: FloatArray = self.law.columns(seen, self.exponents).values @ self.weights
        return predicted

    @property
    def parameters(self) -> dict[str, float]:
        """All of them by name; C itself, where its logarithm is what is searched."""
        found = dict(zip(self.law.weights, self.weights.tolist(), strict=True))
        found |= dict(zip(self.law.exponents, self.exponents.tolist(), strict=True))
        if "log_C" in found:
            found["C"] = float(np.exp(found.pop("log_C")))
        if self.constant is not None:
            found["lambda"] = self.constant
        return found

    @property
    def unidentified(self) -> tuple[str, ...]:
        """Parameters at their bound: the curves do not tell them."""
        names = []
        for name, value, low, high in zip(
            self.law.exponents, self.exponents, self.law.lower, self.law.upper, strict=True
        ):
            margin = _AT_BOUND * (high - low)
            if not low + margin < value < high - margin:
                names.append(name.removeprefix("log_"))
        return (
            *names,
            *(n for n, value in zip(self.law.weights, self.weights, strict=True) if n != "L0" and value == 0),
        )


def fit_law(law: Law, tracks: Sequence[Track], losses: Sequence[FloatArray], near: FloatArray | None = None) -> Fit:
    """The best fit to all curves together. `near`: exponents to go on from, roughly, in place of the law's starts."""
    problem = _Problem(law, list(tracks), np.concatenate(losses))
    if near is not None:
        return problem.search(near, tolerance=1e-5)
    starts = sorted((np.array(start) for start in law.starts), key=problem.cost)
    return min((problem.search(start) for start in starts[:_SEARCHED]), key=lambda found: found.cost)


def fit_momentum(tracks: Sequence[Track], losses: Sequence[FloatArray]) -> Fit:
    """The momentum law, its lambda the best of `LAMBDAS`."""
    fits = []
    for decay in LAMBDAS:
        found = fit_law(momentum(decay), tracks, losses)
        fits.append(replace(found, constant=decay))
    return min(fits, key=lambda found: found.cost)


class _Problem:
    """One fit: what is fitted to what, and the last exponents looked at."""

    def __init__(self, law: Law, tracks: list[Track], losses: FloatArray) -> None:
        self.law = law
        self.tracks = tracks
        self.losses = losses
        self.delta = HUBER * float(losses.mean())
        self.at = np.full(len(law.exponents), np.nan)
        self.trust = np.ones(len(losses))

    def search(self, start: FloatArray, tolerance: float = 1e-8) -> Fit:
        """Follow one start to its end."""
        low, high = np.array(self.law.lower), np.array(self.law.upper)
        margin = 1e-6 * (high - low)
        found = least_squares(
            self.residuals,
            np.clip(start, low + margin, high - margin),
            self.jacobian,
            bounds=(low, high),
            loss="huber",
            f_scale=self.delta,
            x_scale=high - low,
            ftol=tolerance,
            xtol=tolerance,
            max_nfev=60,
        )
        self.look(found.x)
        return Fit(self.law, self.weights, found.x, cost=float(found.cost))

    def cost(self, exponents: FloatArray) -> float:
        """The Huber loss at the best weights."""
        size = np.abs(self.residuals(exponents))
        return float(np.sum(np.where(size <= self.delta, size**2 / 2, self.delta * (size - self.delta / 2))))

    def residuals(self, exponents: FloatArray) -> FloatArray:
        """What the law leaves at the best weights."""
        self.look(exponents)
        return self.left

    def jacobian(self, exponents: FloatArray) -> FloatArray:
        """Derivative of the residuals by the exponents, the weights following (Kaufman 1975's form)."""
        self.look(exponents)
        slopes = np.column_stack([slope * self.weights[column] for column, slope in self.columns.slopes])
        root = np.sqrt(self.trust)[:, None]
        active = self.columns.values[:, self.weights > 0] * root
        follow, *_ = np.linalg.lstsq(active, slopes * root, rcond=None)
        moved: FloatArray = self.columns.values[:, self.weights > 0] @ follow - slopes
        return moved

    def look(self, exponents: FloatArray) -> None:
        """Evaluate the law here, unless this is where it was evaluated last."""
        if np.array_equal(exponents, self.at):
            return
        parts = [self.law.columns(seen, exponents) for seen in self.tracks]
        slopes = [
            (column, np.concatenate([part.slopes[i][1] for part in parts]))
            for i, (column, _) in enumerate(parts[0].slopes)
        ]
        self.columns = Columns(np.concatenate([part.values for part in parts]), slopes)
        self.weights, self.trust = robust_weights(self.columns.values, self.losses, self.delta, self.trust)
        self.left = self.losses - self.columns.values @ self.weights
        self.at = exponents.copy()


def robust_weights(
    values: FloatArray, losses: FloatArray, delta: float, trust: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Weights of 0 or more that minimise the Huber loss, by reweighting; and how much each point counted, 0 to 1.

    `trust` is where the reweighting starts.
    """
    weights = np.zeros(values.shape[1])
    for _ in range(_ROUNDS):
        root = np.sqrt(trust)
        before = weights
        weights, _ = nnls(values * root[:, None], losses * root)
        if np.max(np.abs(weights - before)) <= 1e-9 * weights[0]:
            break
        trust = delta / np.maximum(np.abs(losses - values @ weights), delta)
    return weights, trust
