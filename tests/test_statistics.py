"""Do the statistics of a comparison hold where the truth is known? All noise here is drawn from one fixed seed."""

import math

import numpy as np
import pytest

from llmtrain.study.statistics import (
    LEVEL,
    SPIKE_SIGMAS,
    SPIKE_WINDOW,
    difference,
    fit_peak,
    holm,
    judge,
    seeds_needed,
    spikes,
    text_noise,
)

REPEATS = 1000
MARGIN = math.log1p(0.005)
SEED_NOISE, OWN_NOISE = 0.02, 0.004  # of the seed, shared by all schedules; of one run beside it


def losses(generator: np.random.Generator, truths: list[float], seeds: int, own: float = OWN_NOISE) -> np.ndarray:
    """Final losses of schedules with these true means. (schedules, seeds)"""
    shared = generator.normal(0, SEED_NOISE, seeds)
    return np.array(truths)[:, None] + shared + generator.normal(0, own, (len(truths), seeds))


def by_seed(row: np.ndarray, first: int = 0) -> dict[int, float]:
    return {first + seed: float(loss) for seed, loss in enumerate(row)}


@pytest.mark.parametrize("first", [0, 100], ids=["paired", "other seeds"])
def test_interval_covers_the_truth_in_19_of_20_cases(first: int) -> None:
    """A reader would be told of a gain that is not there, or that nothing can be known."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(REPEATS):
        ours, theirs = losses(generator, [3.99, 4.0], 5)
        if first:
            theirs = losses(generator, [4.0], 5)[0]
        found = difference(by_seed(ours), by_seed(theirs, first), MARGIN)
        assert found.low is not None and found.high is not None and found.paired == (first == 0)
        covered += found.low <= -0.01 <= found.high
    assert 0.93 <= covered / REPEATS <= 0.97


def test_many_equal_schedules_seldom_give_a_winner() -> None:
    """Of twelve schedules that are all the same, some would look better than the baseline in most studies."""
    generator = np.random.default_rng(2)
    claimed = uncorrected = 0
    for _ in range(REPEATS):
        theirs, *others = losses(generator, [4.0] * 13, 5)
        found = [difference(by_seed(one), by_seed(theirs), MARGIN) for one in others]
        claimed += any(one.verdict in ("better", "worse") for one in judge(found, MARGIN))
        uncorrected += any((one.p or 0.0) < LEVEL for one in found)
    assert claimed / REPEATS < 0.05
    assert uncorrected / REPEATS > 0.2


def test_equivalence_is_seldom_claimed_at_the_margin_and_mostly_at_none() -> None:
    """Two schedules that differ by more than the margin would be called the same, or the same ones never so."""
    generator = np.random.default_rng(3)
    false = true = 0
    for _ in range(REPEATS):
        ours, theirs = losses(generator, [4.0 + MARGIN, 4.0], 5, own=0.002)
        (one,) = judge([difference(by_seed(ours), by_seed(theirs), MARGIN)], MARGIN)
        false += one.p_equivalent is not None and one.p_equivalent < LEVEL
        ours, theirs = losses(generator, [4.0, 4.0], 8, own=0.001)
        (one,) = judge([difference(by_seed(ours), by_seed(theirs), MARGIN)], MARGIN)
        true += one.p_equivalent is not None and one.p_equivalent < LEVEL
    assert false / REPEATS <= 0.06
    assert true / REPEATS > 0.95


def test_pairing_gains_what_the_seeds_share() -> None:
    """A study would need tens of seeds where three are enough."""
    generator = np.random.default_rng(4)
    halves: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(REPEATS):
        ours, theirs = losses(generator, [4.0, 4.0], 8)
        for first in (0, 100):
            found = difference(
                by_seed(ours), by_seed(theirs if not first else losses(generator, [4.0], 8)[0], first), 1
            )
            assert found.deviation is not None
            halves[found.paired].append(found.deviation**2)
    expected = (SEED_NOISE**2 + OWN_NOISE**2) / OWN_NOISE**2
    assert np.mean(halves[False]) / np.mean(halves[True]) == pytest.approx(expected, rel=0.08)


def test_seeds_that_are_asked_for_are_enough() -> None:
    """A user would run the seeds that the report asks for, and still know nothing."""
    generator = np.random.default_rng(5)
    deviation = OWN_NOISE * math.sqrt(2)
    seeds = seeds_needed(deviation, MARGIN)
    assert seeds == math.ceil(7.85 * (deviation / MARGIN) ** 2 + 2) == 13
    found = 0
    for _ in range(REPEATS):
        ours, theirs = losses(generator, [4.0 - MARGIN, 4.0], seeds)
        found += (difference(by_seed(ours), by_seed(theirs), MARGIN).p or 0.0) < LEVEL
    assert 0.77 <= found / REPEATS <= 0.88


def test_wide_interval_around_nothing_says_how_many_seeds_would_help() -> None:
    """A report would call schedules equal because too little was run."""
    ours, theirs = {1: 4.00, 2: 4.03, 3: 3.98}, {1: 4.0, 2: 4.0, 3: 4.0}
    (one,) = judge([difference(ours, theirs, MARGIN)], MARGIN)
    assert one.verdict == "not resolvable" and one.difference.deviation is not None
    assert one.seeds_needed == seeds_needed(one.difference.deviation, MARGIN) > 3


def test_without_replicates_there_is_no_interval() -> None:
    """One lucky run would be sold as a result."""
    for ours, theirs in (({1: 4.0}, {1: 4.1}), ({1: 4.0, 2: 4.0}, {3: 4.1}), ({1: 4.0, 2: 9.0}, {1: 4.1, 3: 9.0})):
        found = difference(ours, theirs, MARGIN)
        if len(ours) == len(theirs) == 2:  # one seed in common, two each: not paired, but replicated
            assert not found.paired and found.low is not None
            continue
        (one,) = judge([found], MARGIN)
        assert (one.verdict, found.low, found.p, one.p) == ("one seed", None, None, None)
        assert found.mean == pytest.approx(-0.1)


def test_equal_runs_differ_by_nothing_for_certain() -> None:
    """Runs that are the same to the last byte would divide by zero, or look different."""
    (one,) = judge([difference({1: 4.0, 2: 4.5}, {1: 4.0, 2: 4.5}, MARGIN)], MARGIN)
    assert (one.verdict, one.difference.mean, one.difference.low, one.difference.p) == ("equivalent", 0.0, 0.0, 1.0)


def test_holm_against_its_definition() -> None:
    """A correction with a mistake in its order would pass for the real one."""
    generator = np.random.default_rng(6)
    for count in (1, 2, 7):
        p = generator.uniform(0, 0.2, count).tolist()
        order = sorted(p)
        slow = [min(1.0, max((count - j) * order[j] for j in range(order.index(one) + 1))) for one in p]
        assert holm(p) == slow
    assert holm([]) == []


def test_text_noise_covers_what_another_validation_set_would_give() -> None:
    """A difference that fifty documents made would pass for one of the schedules."""
    generator = np.random.default_rng(7)
    covered = 0
    for repeat in range(200):
        tokens = generator.integers(20, 400, 100).astype(np.float64)
        nats = tokens * (-0.01 + generator.normal(0, 0.05, 100))
        found = text_noise(nats, tokens, seed=repeat)
        covered += found.low <= -0.01 <= found.high
    assert 0.91 <= covered / 200 <= 0.98
    assert found == text_noise(nats, tokens, seed=repeat)
    nats = generator.normal(0, 1, 50_000)
    grouped = text_noise(nats, np.full(50_000, 100.0))
    assert grouped.deviation == pytest.approx(nats.std() / 100 / math.sqrt(50_000), rel=0.1)


def test_parabola_finds_the_peak_between_those_that_were_run() -> None:
    """The learning rate for the next run would be off, or an unfinished search would go unnoticed."""
    truth = {peak: 4.0 + 0.02 * math.log2(peak / 1.3e-3) ** 2 for peak in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)}
    found = fit_peak(truth)
    assert (found.best, found.edge) == (1e-3, "")
    assert found.optimum == pytest.approx(1.3e-3) and found.loss == pytest.approx(4.0)
    assert found.rise == pytest.approx(0.02)
    assert fit_peak({1e-3: 4.0, 2e-3: 3.9, 4e-3: 3.8}).edge == "highest"
    assert fit_peak({1e-3: 4.0, 2e-3: 3.9, 4e-3: 3.8}, [8e-3]).edge == ""
    assert fit_peak({1e-3: 3.7, 2e-3: 3.8, 4e-3: 4.2}).edge == "lowest"
    assert fit_peak({1e-3: 3.9, 2e-3: 4.0}).optimum is None
    assert fit_peak({1e-3: 3.9, 2e-3: 4.0, 64e-3: 9.0}).optimum is None  # too far away to say anything of the best


def test_spikes_are_counted_as_by_hand() -> None:
    """A run that nearly blew up would look as calm as the others."""
    generator = np.random.default_rng(8)
    curve = 3 + 4 / np.arange(1, 1001) + generator.normal(0, 0.01, 1000)
    assert spikes(curve) == 0
    for start, length in ((300, 1), (600, 5), (999, 1)):
        curve[start : start + length] += 2.0
    by_hand = [
        curve[k] > curve[k - SPIKE_WINDOW : k].mean() + SPIKE_SIGMAS * curve[k - SPIKE_WINDOW : k].std()
        for k in range(SPIKE_WINDOW, 1000)
    ]
    slow = sum(now and not before for before, now in zip([False, *by_hand], by_hand, strict=False))
    assert spikes(curve) == slow == 3
    assert spikes(np.full(500, 3.0)) == spikes(curve[:100]) == 0
