"""Do the laws find what is true, where the truth is known?"""

import numpy as np
import pytest
from scipy.stats import spearmanr

from llmtrain.study.law import laws
from llmtrain.study.law.curves import LossCurve
from llmtrain.study.law.fit import Fit, fit_law, fit_momentum
from llmtrain.study.law.fitted import FittedLaw, covered, errors_on, fit_curves, predict
from llmtrain.study.law.optimise import Optimised, lrs_of, optimise
from tests.law_reference import PEAK, TRUTH, known_curve, momentum_law, multi_power, rates, regression

OTHER_TRUTHS = [
    {"L0": 2.7, "A": 0.6, "alpha": 0.6, "B": 0.15, "C": 20.0, "beta": 0.3},
    {"L0": 1.9, "A": 1.4, "alpha": 0.3, "B": 0.2, "C": 3.0, "beta": 1.5},
]
FITTED = ("wsd:floor=0", "cosine:floor=0.1")
UNSEEN = (
    "constant",
    "linear",
    "linear:floor=0.1",
    "cosine",
    "wsd:cooldown=1-sqrt",
    "wsd:cooldown=cosine",
    "wsd:decay=10%",
    "wsd:decay=40%",
    "polynomial:power=2",
)


@pytest.fixture(scope="module")
def known_law() -> FittedLaw:
    """Fitted to two noisy runs of a known law."""
    return fit_curves([known_curve("wsd", 3000, noise=2e-3), known_curve("cosine", 3000, noise=2e-3)])


@pytest.fixture(scope="module")
def best(known_law: FittedLaw) -> Optimised:
    return optimise(known_law, 3000, 100, 0.1)


def fit_of(truth: dict[str, float]) -> Fit:
    weights = np.array([truth["L0"], truth["A"], truth["B"]])
    return Fit(laws.mpl(), weights, np.array([truth["alpha"], np.log(truth["C"]), truth["beta"]]))


def test_gathered_drops_give_the_losses_of_the_formula() -> None:
    """Fits and predictions would be of another law than the published one."""
    places = np.arange(125, 2001, 25)
    for name in ("wsd", "cosine", "constant", "multistep"):
        lrs = rates(name, 2000)
        seen = laws.track(lrs / PEAK, 100, places)
        exact = multi_power(lrs, 100, places, TRUTH)
        assert np.abs(fit_of(TRUTH).losses(seen) - exact).max() < 1e-5
        slow = Fit(laws.momentum(0.99), np.array([2.5, 1.0, 0.3]), np.array([0.45]))
        assert np.allclose(slow.losses(seen), momentum_law(lrs, 100, places, 0.99, TRUTH), rtol=1e-12, atol=0)


def test_a_long_run_seen_at_one_place_is_as_exact() -> None:
    """The final loss of a schedule would depend on how many places were asked for."""
    lrs = rates("cosine", 20_000)
    last = np.array([20_000])
    found = fit_of(TRUTH).losses(laws.track(lrs / PEAK, 100, last))
    assert np.abs(found - multi_power(lrs, 100, last, TRUTH)).max() < 2e-5


@pytest.mark.parametrize("truth", [TRUTH, *OTHER_TRUTHS], ids=["slow", "small", "steep"])
def test_parameters_of_a_multi_power_world_are_recovered(truth: dict[str, float]) -> None:
    """Parameters would be reported that the runs do not have."""
    places = np.arange(125, 6001, 25)
    curves = [rates(name, 6000) for name in ("wsd", "cosine")]
    tracks = [laws.track(lrs / PEAK, 100, places) for lrs in curves]
    found = fit_law(laws.mpl(), tracks, [multi_power(lrs, 100, places, truth) for lrs in curves])
    for name, value in truth.items():
        assert abs(found.parameters[name] / value - 1) < 0.01, name
    assert found.unidentified == ()


def test_parameters_of_a_momentum_world_are_recovered() -> None:
    """The second law, whose disagreement is part of every interval, would be a bad fit."""
    places = np.arange(125, 6001, 25)
    curves = [rates(name, 6000) for name in ("wsd", "cosine")]
    tracks = [laws.track(lrs / PEAK, 100, places) for lrs in curves]
    found = fit_momentum(tracks, [momentum_law(lrs, 100, places, 0.995, TRUTH) for lrs in curves])
    assert found.parameters["lambda"] == 0.995
    for name in ("L0", "A", "alpha", "B"):
        assert abs(found.parameters[name] / TRUTH[name] - 1) < 0.01, name


def test_one_bad_evaluation_does_not_move_the_law() -> None:
    """A single loss spike in one run would change the prediction of every schedule."""
    curves = [known_curve("wsd", 3000), known_curve("cosine", 3000)]
    tracks = [curve.track(PEAK) for curve in curves]
    spiked = [curve.losses.copy() for curve in curves]
    spiked[0][40] += 1.0
    clean, found = (fit_law(laws.mpl(), tracks, losses) for losses in ([c.losses for c in curves], spiked))
    seen = laws.track(rates("linear", 3000) / PEAK, 100, np.array([3000]))
    assert abs(found.losses(seen)[0] - clean.losses(seen)[0]) < 1e-3


def test_regression_world_is_predicted_and_ranked() -> None:
    """The law would rank schedules otherwise than training does, in the one world whose losses are known exactly."""
    names = (*FITTED, *UNSEEN)
    lrs = np.column_stack([rates(name, 8000, peak=0.3, floor=0.0) for name in names])
    losses = regression(lrs, every=50)
    places = np.arange(150, 8001, 50)
    curves = [LossCurve(name, lrs[:, i], 100, places, losses[2:, i], {}) for i, name in enumerate(names)]
    law = fit_curves(curves[:2])
    measured = np.array([curve.losses[-1] for curve in curves[2:]])
    predicted = np.array([float(law.primary.losses(curve.track(0.3))[-1]) for curve in curves[2:]])
    assert np.abs(predicted - measured).max() < 1e-3 < np.ptp(measured) / 5
    assert spearmanr(predicted, measured).statistic > 0.95
    errors = {fit.law.name: errors_on(law, fit, curves[2:])["mean_relative_error"] for fit in law.others}
    assert errors_on(law, law.primary, curves[2:])["mean_relative_error"] < min(errors["time"], errors["area"]) / 5


def test_intervals_hold_what_was_not_fitted(known_law: FittedLaw) -> None:
    """A user would trust a difference that is noise."""
    unseen = [known_curve(name, 3000, noise=2e-3) for name in ("linear", "constant", "wsd:decay=40%")]
    assert covered(known_law, unseen) >= 0.9
    halves = predict(known_law, unseen[0].lrs, 100, unseen[0].steps).half_widths
    assert np.all(halves > 0) and halves.max() < 0.1


def test_interval_widens_beyond_the_fitted_horizon(known_law: FittedLaw) -> None:
    """A guess at four times the horizon would look as sure as one within it."""
    near, far = (
        predict(known_law, rates("constant", updates), 100, np.array([updates])).half_widths[0]
        for updates in (3000, 12_000)
    )
    assert far > 2 * near


def test_optimised_schedule_falls_from_the_peak_to_the_floor(known_law: FittedLaw, best: Optimised) -> None:
    """The section would not run, or run another curve than the one that was predicted."""
    lrs = lrs_of(best.section)
    assert len(lrs) == 3000 and lrs[99] == PEAK == lrs.max() and lrs[0] == pytest.approx(PEAK / 100)
    assert np.all(np.diff(lrs[99:]) <= 0) and lrs[-1] >= 0.1 * PEAK * (1 - 1e-5)
    final = predict(known_law, lrs, 100, np.array([3000])).losses[0]
    assert final == best.ranked[0].loss and best.ranked[0].label == "optimised"


def test_optimised_schedule_is_better_in_truth(best: Optimised) -> None:
    """The search would exploit the law's errors: predicted gains that training does not give."""
    true = {one.label: multi_power(one.asked.lrs, 100, [3000], TRUTH)[0] for one in best.ranked}
    assert true["optimised"] <= min(true.values()) + 1e-3
    assert best.gain == pytest.approx(true[best.rival] - true["optimised"], abs=2e-3)
    assert best.gain >= 0 and best.interval[0] <= best.interval[1]
    assert best.resolved == (best.gain > best.resolvable and best.interval[0] > 0)


def test_a_long_horizon_is_searched_in_strides(known_law: FittedLaw) -> None:
    """Optimising a run of a hundred thousand updates would take minutes, or find the optimum of another horizon."""
    found = optimise(known_law, 100_000, 2000, 0.1)
    assert found.ranked[0].label == "optimised"
    assert len(lrs_of(found.section)) == 100_000
    assert {"horizon_beyond"} == {doubt.name for doubt in found.ranked[0].doubts}
