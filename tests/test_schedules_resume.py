"""Is a resumed run refused, extended or replaced exactly as documented, however often it is resumed?"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import ScheduleConfig
from llmtrain.errors import ScheduleError
from llmtrain.schedules import Schedule, continues, diff, extend, latest, plan, refusal, replace


def make(name: str = "cosine", tokens: int = 1000, **keys: Any) -> Schedule:
    keys = {"peak": 1.0, "warmup": "10 steps", "horizon": "100 steps", "floor": 0.1, **keys}
    return plan(ScheduleConfig(name=name, **keys), tokens_per_update=tokens)


AT = 60
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "longer": ({"horizon": "200 steps"}, "params.horizon"),
    "shorter": ({"horizon": "50 steps"}, "params.horizon"),
    "peak": ({"peak": 0.5}, "params.peak"),
    "floor": ({"floor": 0.0}, "params.floor"),
    "warmup": ({"warmup": "20 steps"}, "params.warmup"),
    "shape": ({"name": "linear"}, "name"),
}


def test_unchanged_goes_on() -> None:
    """Else a run would be refused its own checkpoint."""
    assert continues(make(), make()) and not diff(make().spec, make().spec)
    assert replace(make(), AT, make()) == make()


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_any_change_is_refused_with_both_sides(change: str) -> None:
    """Else a changed config would bend the curve of a running experiment in silence."""
    keys, field = CHANGES[change]
    old, new = make(), make(**keys)
    assert not continues(old, new)
    assert field in [row.field for row in diff(old.spec, new.spec)]
    text = refusal(old, new, AT)
    assert (
        field.replace("params", "schedule") in text and f"{old.lr(AT):.6g}" in text and f"{new.lr(AT + 1):.6g}" in text
    )
    assert all(word in text for word in ("checkpoint", "config", "extend", "replace", "branch"))


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_replace_is_all_or_nothing(change: str) -> None:
    """Else a field of the old schedule would survive in the new one."""
    old, new = make(), make(**CHANGES[change][0])
    s = replace(old, AT, new)
    for k in range(1, AT + 1):
        assert s.lr(k) == pytest.approx(old.lr(k), rel=1e-15)
        assert s.lr(k) == old.lr(k) or old.peak != new.peak
    for k in range(AT + 1, 300):
        assert s.lr(k) == new.lr(k)
    assert (s.total_updates, s.peak, s.floor) == (new.total_updates, new.peak, new.floor)
    assert continues(s, new) and not continues(s, old) and latest(s) == new


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"shorter"}))
def test_extend_is_continuous_and_ends_at_the_new_floor(change: str) -> None:
    """Else extending a run would jump in its learning rate, or never anneal it."""
    old, new = make(), make(**CHANGES[change][0])
    s = extend(old, AT, new)
    reached, end = old.lr(AT) / new.peak, new.floor
    for k in range(AT + 1, new.total_updates):
        assert s(k) == pytest.approx(end + (reached - end) * (new(k) - end) / (new(AT) - end), abs=1e-15)
    assert abs(s.lr(AT + 1) - old.lr(AT)) < 0.03
    assert s(new.total_updates) == s(new.total_updates + 50) == new.floor
    assert s.decayed(new.total_updates) and not s.decayed(new.total_updates - 1)
    assert (np.diff(s.multipliers(range(AT, 260))) <= 0).all()


def test_extending_a_trunk_before_its_cooldown_is_the_longer_schedule() -> None:
    """Else a WSD run made longer would not equal one that was planned longer from the start."""
    long = make("wsd", horizon="300 steps")
    s = extend(make("wsd"), AT, long)
    assert (s.multipliers(range(400)) == long.multipliers(range(400))).all()
    early = extend(make(), 5, make(horizon="200 steps"))
    assert (early.multipliers(range(300)) == make(horizon="200 steps").multipliers(range(300))).all()


def test_extend_within_a_changed_warmup_heads_for_the_peak() -> None:
    """Else a warm-up lengthened in mid-course would jump, or never reach the peak."""
    new = make(warmup="20 steps")
    s = extend(make(), 5, new)
    assert s(5) == 0.5 and s.multipliers(range(5, 21)) == pytest.approx(np.linspace(0.5, 1.0, 16), abs=1e-12)
    assert s(20) == 1.0 and s(60) == new(60)


def test_extend_onto_a_constant_is_a_straight_line() -> None:
    """Else a run could not be brought over continuously to another constant rate."""
    s = extend(make("constant", peak=1.0), 50, make("constant", peak=0.5))
    assert s.lr(50) == 1.0 and s.lr(75) == pytest.approx(0.75) and s.lr(100) == s.lr(200) == 0.5


@pytest.mark.parametrize(
    ("old", "at", "new", "wanted"),
    [
        ({}, AT, {"horizon": "50 steps"}, "write a longer one"),
        ({}, AT, {"name": "sgdr"}, "use replace"),
        ({"floor": 0.0}, 100, {"floor": 0.0, "horizon": "200 steps"}, "warms up again"),
    ],
)
def test_extension_that_cannot_be_is_refused(old: dict[str, Any], at: int, new: dict[str, Any], wanted: str) -> None:
    """Else a finished, or a restarting, curve would be stretched into learning rates that nobody asked for."""
    with pytest.raises(ScheduleError, match=wanted):
        extend(make(**old), at, make(**new))


@settings(max_examples=60, deadline=None)
@given(
    modes=st.lists(
        st.tuples(st.sampled_from([extend, replace]), st.sampled_from(sorted(CHANGES))), min_size=1, max_size=3
    )
)
def test_resuming_a_resumed_run_is_exact(modes: list[tuple[Any, str]]) -> None:
    """Else the second resume after a change would use other learning rates than the first."""
    s, at = make(), 20
    for mode, change in modes:
        before, new = s, make(**{"horizon": f"{100 + at} steps", **CHANGES[change][0]})
        try:
            s = mode(s, at, new)
        except ScheduleError:
            continue
        ks = np.arange(300)
        f = s.multipliers(ks)
        assert np.isfinite(f).all() and (f >= 0).all()
        assert [s(int(k)) for k in ks[::7]] == f[::7].tolist()
        assert np.abs(s.peak * f[: at + 1] - before.peak * before.multipliers(ks[: at + 1])).max() <= 1e-15
        again = Schedule.from_spec(s.spec)
        assert again == s and again.hash == s.hash and (again.multipliers(ks) == f).all()
        assert continues(s, new)
        at += 15


@pytest.mark.parametrize("mode", [extend, replace])
def test_batch_doubled_in_token_mode_keeps_the_curve_over_tokens(mode: Any) -> None:
    """Else a resume with twice the batch would bend, or jump along, a schedule written in tokens."""
    keys = {"warmup": "10K tokens", "horizon": "100K tokens"}
    old, new = make(**keys), make(tokens=2000, **keys)
    assert not continues(old, new) and "tokens_per_update" in refusal(old, new, AT)
    s = mode(old, AT, new)
    assert [s(AT + j) for j in range(1, 30)] == [old(AT + 2 * j) for j in range(1, 30)]
    assert [s(k) for k in range(AT)] == [old(k) for k in range(AT)]
    assert s.total_updates == 80 and s(80) == 0.1 and continues(s, new)
    assert s(70) == old.with_batch(AT, 2000)(70)
    again = mode(s, 70, make(tokens=1000, **keys))
    assert [again(70 + j) for j in range(1, 30)] == [old(80 + j) for j in range(1, 30)]
    assert s.with_batch(70, 1000)(75) == again(75)


def test_replace_by_a_shorter_horizon_rests_at_the_floor() -> None:
    """Else a horizon that is already past would give a rate from somewhere in the old curve."""
    s = replace(make(), AT, make(horizon="50 steps"))
    assert s(AT) == make()(AT) and s(AT + 1) == s(500) == 0.1 and s.total_updates == 50 and s.decayed(AT + 1)
