"""Are the numbers that a preview prints right, and do the adapters give every framework the same learning rates?"""

import math
from typing import Any

import numpy as np
import pytest

from llmtrain.config import ScheduleConfig
from llmtrain.errors import ScheduleError
from llmtrain.schedules import Schedule, plan
from llmtrain.schedules.adapters import lambda_lr, lr_scheduler, optax_schedule
from llmtrain.schedules.summary import convex_bound, ema_coefficients, summarize


def make(name: str, warmup: str = "0 steps", horizon: str = "4000 steps", floor: float = 0.0, **keys: Any) -> Schedule:
    config = ScheduleConfig(name=name, **{"peak": 1.0, "warmup": warmup, "horizon": horizon, "floor": floor, **keys})
    return plan(config, tokens_per_update=1)


@pytest.mark.parametrize(
    ("name", "keys", "bound", "peak"),
    [
        ("linear", {}, 1.000, 1.00),
        ("wsd", {"decay": "40%"}, 1.029, 0.61),
        ("cosine", {}, 1.030, 0.97),
        ("polynomial", {"power": 2.0}, 1.060, 1.42),
        ("wsd", {"decay": "20%", "cooldown": "1-sqrt"}, 1.063, 0.54),
        ("wsd", {"decay": "20%"}, 1.081, 0.51),
        ("cosine", {"floor": 0.1}, 1.087, 0.84),
        ("linear", {"floor": 0.1}, 1.090, 0.83),
        ("wsd", {"decay": "20%", "cooldown": "cosine"}, 1.096, 0.51),
        ("multistep", {"levels": [0.316, 0.1]}, 1.118, 0.53),
        ("wsd", {"decay": "20%", "cooldown": "square"}, 1.120, 0.48),
        ("wsd", {"decay": "10%"}, 1.143, 0.46),
        ("constant", {}, 1.569, 0.32),
    ],
)
def test_convex_bound_of_known_shapes(name: str, keys: dict[str, Any], bound: float, peak: float) -> None:
    """Else the score would rank shapes wrongly and centre a sweep of peaks on the wrong rate."""
    found = summarize(make(name, **keys))
    assert found.bound_ratio == pytest.approx(bound, abs=1.5e-3)
    assert found.peak_ratio == pytest.approx(peak, abs=6e-3)


def test_convex_bound_against_the_double_sum() -> None:
    """Else the reversed running sums could hide an index off by one."""
    e = make("cosine", "5 steps", "40 steps", 0.1).multipliers(range(1, 41)).tolist()
    noise = sum(v * v for v in e) / (2 * sum(e))
    for k in range(len(e) - 1):
        noise += 0.5 * e[k] * sum(v * v for v in e[k:]) / (sum(e[k:]) * sum(e[k + 1 :]))
    grid = [1 / (2 * g * sum(e)) + g * noise for g in np.geomspace(1e-3, 10, 20001)]
    bound, best = convex_bound(np.array(e))
    assert bound == pytest.approx(min(grid), rel=1e-6)
    assert bound == pytest.approx(1 / (2 * best * sum(e)) + best * noise, rel=1e-12)
    assert convex_bound(np.zeros(3)) == (math.inf, math.inf)


def test_sums_of_a_schedule_small_enough_to_add_by_hand() -> None:
    """Else the area, the mean or the share of the decay in a preview would be wrong."""
    found = summarize(make("linear", "2 steps", "6 steps", peak=2.0), weight_decay=0.5)
    assert found.area == pytest.approx(2 * (0.5 + 1 + 0.75 + 0.5 + 0.25))
    assert found.mean_multiplier == pytest.approx(3 / 6)
    assert found.decay_share == pytest.approx(1.5 / 3)
    assert found.sum_of_squares == pytest.approx(4 * (0.25 + 1 + 0.5625 + 0.25 + 0.0625))
    assert (found.peak_update, found.peak_lr) == (2, 2.0)
    assert found.first_lrs == (1.0, 2.0, 1.5) and found.last_lrs == (1.0, 0.5, 0.0)
    assert found.averaging_window is None
    assert summarize(make("constant", peak=1e-3), weight_decay=0.1).averaging_window == pytest.approx(1e4)


def test_ema_coefficients_are_the_weights_of_adamw() -> None:
    """Else the averaging view would not be what AdamW's weight decay does."""
    lrs, decay, weights = [0.5, 0.3, 0.2, 0.1], 0.4, 7.0
    updates = [1.0, -2.0, 3.0, 5.0]
    c = ema_coefficients(np.array(lrs), decay)
    for lr, update in zip(lrs, updates, strict=True):
        weights = weights * (1 - lr * decay) + lr * decay * update
    untouched = math.prod(1 - lr * decay for lr in lrs)
    assert weights == pytest.approx(7.0 * untouched + sum(a * b for a, b in zip(c, updates, strict=True)))
    assert c.sum() + untouched == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("keys", "stop_at", "wanted"),
    [
        ({}, 5000, "the decay ends at update 4000, the run at 5000"),
        ({}, 3000, "the run ends at update 3000"),
        ({"name": "multistep"}, None, "reached at update 3601"),
        ({"warmup": "500 steps"}, None, "more than 10 %"),
        ({"convention": "deepspeed", "warmup": "10 steps"}, None, "the peak is never reached"),
    ],
)
def test_warnings_name_what_is_wrong(keys: dict[str, Any], stop_at: int | None, wanted: str) -> None:
    """Else a run that is never annealed, or never at its peak, would be paid for before anyone noticed."""
    found = summarize(make(**{"name": "cosine", "warmup": "1%", **keys}), stop_at=stop_at)
    assert wanted in "; ".join(found.warnings)


def test_sound_schedule_has_no_warnings() -> None:
    """Else users would learn to ignore the warnings."""
    for name in ("cosine", "linear", "wsd", "constant", "inverse_sqrt"):
        assert summarize(make(name, "1%", floor=0.1)).warnings == ()


def test_torch_adapters_give_each_group_its_own_base() -> None:
    """Else a ResNet trained with our schedule and two base rates would get another curve than its config says."""
    torch = pytest.importorskip("torch")
    s = make("cosine", "3 steps", "12 steps", 0.1)

    def optimizer() -> Any:
        a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        return torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.1}], lr=1.0)

    for build in (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda_lr(s)), lambda o: lr_scheduler(o, s)):
        sgd = optimizer()
        scheduler = build(sgd)
        for k in range(1, 15):
            assert [group["lr"] for group in sgd.param_groups] == [0.5 * s(k), 0.1 * s(k)]
            sgd.step()
            scheduler.step()


def test_torch_scheduler_state_is_the_counter_and_the_spec() -> None:
    """Else a restored scheduler could carry an old peak along, as torch's own do."""
    torch = pytest.importorskip("torch")
    s = make("cosine", "3 steps", "12 steps", 0.1)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = lr_scheduler(sgd, s)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    for _ in range(5):
        sgd.step()
        scheduler.step()
    state = scheduler.state_dict()
    assert state == {"last_epoch": 5, "spec": s.spec}
    fresh = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    resumed = lr_scheduler(fresh, s)
    resumed.load_state_dict(state)
    assert fresh.param_groups[0]["lr"] == 2.0 * s(6) and resumed.get_last_lr() == [2.0 * s(6)]
    with pytest.raises(ScheduleError, match="another schedule"):
        lr_scheduler(fresh, make("linear")).load_state_dict(state)


def test_optax_counts_updates_done() -> None:
    """Else a JAX run would be one update off."""
    s = make("linear", "2 steps", "10 steps", peak=0.5)
    schedule = optax_schedule(s)
    assert [schedule(count) for count in range(12)] == [s.lr(k) for k in range(1, 13)]
