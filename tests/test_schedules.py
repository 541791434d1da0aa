"""Is every schedule the function its docstring says, for every length, floor and warm-up a user may write?

`reference` writes each formula once more, for one update at a time and without NumPy; the catalog is compared with it.
"""

import json
import math
import pickle
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmtrain.config import ScheduleConfig
from llmtrain.schedules import Schedule, catalog, plan
from llmtrain.schedules.phases import Cooldown
from llmtrain.schedules.warmups import WARMUPS

NAMES = [shape.name for shape in catalog()]
DRAWS_ITS_OWN_WARMUP = {"one_cycle", "piecewise", "refined"}
COOLDOWNS = list(Cooldown.__args__)  # type: ignore[attr-defined]
NEEDED: dict[str, dict[str, Any]] = {
    "piecewise": {"knots": [["0%", 0.0], ["10%", 1.0], ["100%", 0.0]]},
    "refined": {"norms": [2.0, 1.0, 1.0, 1.5]},
    "chain": {"pieces": [{"name": "constant", "length": "50%"}, {"name": "cosine"}]},
}


def make(name: str, warmup: Any = "0 steps", horizon: Any = "100 steps", tokens: int = 1000, **keys: Any) -> Schedule:
    keys = {"floor": 0.1, "peak": 3e-4, **NEEDED.get(name, {}), **keys}
    return plan(ScheduleConfig(name=name, warmup=warmup, horizon=horizon, **keys), tokens_per_update=tokens)


def steps(low: int, high: int) -> st.SearchStrategy[str]:
    return st.integers(low, high).map(lambda n: f"{n} steps")


@st.composite
def planned(draw: st.DrawFn, name: str) -> tuple[Schedule, int, int, float, dict[str, Any]]:
    """A schedule of that name with W, T, floor and the parameters it was written with."""
    T = draw(st.one_of(st.just(1), st.integers(2, 6), st.integers(7, 300)))
    W = draw(st.sampled_from([0, min(1, T), T, T // 10, T // 3]))
    floor = draw(st.sampled_from([0.0, 1.0, 0.1, 0.25, 0.01]))
    W = 0 if name in DRAWS_ITS_OWN_WARMUP else W
    own = draw(parameters(name, W, T, floor))
    assume(own is not None)
    tokens = draw(st.sampled_from([1, 7, 4096]))
    in_tokens = draw(st.booleans())
    horizon, warmup = (f"{T * tokens} tokens", f"{W * tokens} tokens") if in_tokens else (f"{T} steps", f"{W} steps")
    shape = draw(st.sampled_from([warm for warm in WARMUPS if warm not in ("log", "geometric")]))
    start = draw(st.sampled_from([0.0, 0.3]))
    keys = {"warmup_shape": shape, "warmup_start": start, "floor": floor, **own}
    return make(name, warmup, horizon, tokens, **keys), W, T, floor, keys


def parameters(name: str, W: int, T: int, floor: float) -> st.SearchStrategy[Any]:
    """What may stand beside `schedule.name`; None where that shape cannot be that short or that low."""
    share, above = st.floats(0, 1), st.floats(0.2, 4)
    span = max(T - W, 1)
    some_cooldown = st.sampled_from([c for c in COOLDOWNS if floor or c not in ("exponential", "harmonic")])
    drops = st.lists(st.integers(max(W, 1), T), min_size=2, max_size=2, unique=True).map(sorted)
    impossible = (name in ("chain", "rewarm") and T - W < 4) or (name == "exponential" and not floor)
    if impossible or (name == "multistep" and T - max(W, 1) < 1):
        return st.none()
    split = st.integers(1, max(span - 3, 1))
    choices: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "cosine": {"exponent": above, "theta": above},
        "hybrid": {"weight": share},
        "cosine_linear": {"tail": steps(0, span), "cosine_floor": share},
        "polynomial": {"power": above},
        "inverse_sqrt": {"timescale": st.one_of(st.just("auto"), steps(1, 2 * T))},
        "power": {"exponent": above, "knee": st.one_of(st.just("auto"), steps(max(W, 1), T)), "tail": steps(0, span)},
        "step": {"every": steps(1, T), "factor": share},
        "multistep": {"drops": drops.map(lambda two: [f"{n} steps" for n in two]), "levels": st.just([0.5, 0.2])},
        "one_cycle": {"rise": steps(0, T - 1), "start": share, "anneal": st.sampled_from(["cosine", "linear"])},
        "sgdr": {"cycles": st.integers(1, 5), "lengthen": st.floats(0.5, 2), "shrink": share},
        "wsd": {"decay": steps(0, T - W), "cooldown": some_cooldown},
        "wsd_s": {
            "cycles": st.integers(1, min(4, span)),
            "decay_share": above.map(lambda v: v / 4),
            "cooldown": some_cooldown,
        },
        "infinite": {
            "cooldown": steps(1, max(span // 2, 1)),
            "level": st.floats(max(floor, 0.2), 1),
            "curve": st.sampled_from(["cosine", "rsqrt"]),
            "anneal": steps(0, span // 2),
            "anneal_shape": some_cooldown,
        },
        "rewarm": {
            "first": split.map(lambda n: f"{W + n} steps"),
            "rise": steps(0, 1),
            "level": st.floats(max(floor, 0.1), 1),
        },
        "piecewise": {
            "knots": st.lists(share, min_size=1, max_size=5).map(lambda v: [[f"{i} steps", y] for i, y in enumerate(v)])
        },
        "refined": {"norms": st.lists(st.floats(0.1, 10), min_size=2, max_size=30), "smooth": share},
        "chain": {
            "pieces": split.map(
                lambda n: [{"name": "linear", "length": f"{n} steps", "end": 0.4}, {"name": "wsd", "decay": "1 steps"}]
            )
        },
    }
    return st.fixed_dictionaries(choices.get(name, {}))


def cooldown(name: str, y: float, floor: float, start: float = 1.0) -> float:
    if name == "exponential":
        return math.exp(math.log(start) * (1 - y) + math.log(floor) * y)
    if name == "harmonic":
        return 1 / (y / floor + (1 - y) / start)
    cos = (1 + math.cos(math.pi * y)) / 2
    fall = {
        "linear": 1 - y,
        "1-sqrt": 1 - math.sqrt(y),
        "cosine": cos,
        "mirror-cosine": 2 - 2 * y - cos,
        "square": 1 - y**2,
        "half-life": 2 ** (1 - y) - 1,
    }
    return floor + (start - floor) * fall[name]


def steps_of(text: str, default: int = 0) -> int:
    return default if text == "auto" else int(text.split()[0])


def reference(name: str, k: int, W: int, T: int, m: float, p: dict[str, Any]) -> float | None:
    """Multiplier of update k >= W of the shapes that one line can say; None for the others."""
    span = max(T - W, 1)
    t = min(max(k - W, 0), span)
    x = t / span
    cos = (1 + math.cos(math.pi * x)) / 2
    whole = {
        "constant": lambda: 1.0,
        "linear": lambda: 1 - x,
        "cosine": lambda: ((1 + math.cos(math.pi * x ** p["theta"])) / 2) ** p["exponent"],
        "half_cosine": lambda: 1 - math.sin(math.pi * x / 2),
        "hybrid": lambda: p["weight"] * cos + (1 - p["weight"]) * (1 - x),
        "polynomial": lambda: (1 - x) ** p["power"],
        "inverse_sqrt": lambda: (1 + t / steps_of(p["timescale"], max(W, 1))) ** -0.5,
        "step": lambda: p["factor"] ** max(math.ceil(t / steps_of(p["every"])) - 1, 0),
        "multistep": lambda: [1.0, *p["levels"]][sum(W + t > steps_of(d) for d in p["drops"])],
        "piecewise": lambda: p["knots"][min(k, len(p["knots"]) - 1)][1],
    }
    if name in whole:
        return m + (1 - m) * whole[name]()
    if name == "exponential":
        return m**x
    if name == "wsd":
        D = steps_of(p["decay"])
        return cooldown(p["cooldown"], max(t - (span - D), 0) / D, m) if D else (1.0 if t < span else m)
    if name == "one_cycle":
        top = min(steps_of(p["rise"]), T - 1)
        if k < top:
            return cooldown(p["anneal"], 1 - k / top, p["start"])
        return cooldown(p["anneal"], (t - top) / (T - top), m)
    if name == "power":
        D = min(steps_of(p["tail"]), span)
        law = max((W + min(t, span - D)) / steps_of(p["knee"], max(W, 1)), 1) ** -p["exponent"]
        return m + (1 - m) * law * (min((span - t) / D, 1) if D else 1)
    return None


def rising(shape: str, start: float, x: float) -> float:
    value = {
        "none": 1.0,
        "linear": x,
        "cosine": (1 - math.cos(math.pi * x)) / 2,
        "1-sqrt": 1 - math.sqrt(1 - x),
        "exponential": math.expm1(-2 * x) / math.expm1(-2),
    }[shape]
    return start + (1 - start) * value


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_schedule_keeps_its_promises(name: str, data: st.DataObject) -> None:
    """Else some length, floor or warm-up trains at a rate that is negative, above the peak, or off its formula."""
    s, W, T, floor, keys = data.draw(planned(name))
    ks = np.arange(T + 6)
    f = s.multipliers(ks)
    assert np.isfinite(f).all() and (f >= 0).all() and (f <= 1 + 1e-15).all()
    assert (s.total_updates, s.warmup_updates, s.peak, s.floor) == (T, W, 3e-4, floor)
    assert (f[T + 1 :] == f[T + 1]).all()
    shape = next(shape for shape in catalog() if shape.name == name)
    if shape.ends == "floor" and T > W:
        assert f[T] == floor
    if name not in DRAWS_ITS_OWN_WARMUP:
        assert (f[W:] >= floor - 1e-15).all()
        assert f[W] == 1.0
        for k in range(W):
            assert f[k] == pytest.approx(rising(keys["warmup_shape"], keys["warmup_start"], k / W), abs=1e-15)
    if not shape.cyclic:
        assert (np.diff(f[W:]) <= 1e-15).all()
    for k in range(W, T + 1):
        expected = reference(name, k, W, T, floor, keys)
        assert expected is None or f[k] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_value_does_not_depend_on_how_it_is_asked(name: str, data: st.DataObject) -> None:
    """Else a resumed run, a preview and a report would disagree about the learning rate of one update."""
    s, _, T, *_ = data.draw(planned(name))
    ks = list(range(T + 5))
    f = s.multipliers(ks)
    shuffled = random.Random(T).sample(ks, len(ks))
    for k in shuffled:
        assert s(k) == f[k] and s.lr(k) == s.peak * f[k]
    assert (s.multipliers(np.array(shuffled)) == f[shuffled]).all()
    assert (s.multipliers(ks[3:]) == f[3:]).all()
    again = Schedule.from_spec(json.loads(json.dumps(s.spec)))
    assert again == s and again.hash == s.hash and (again.multipliers(ks) == f).all()
    assert (pickle.loads(pickle.dumps(s)).multipliers(ks) == f).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "hybrid", "cosine_linear", "inverse_sqrt", "half_cosine"])
def test_slope_is_bounded(name: str) -> None:
    """Else a smooth shape would hide a jump that shocks the optimizer."""
    s = make(name, warmup="100 steps", horizon="1100 steps", floor=0.0)
    slope = np.abs(np.diff(s.multipliers(np.arange(100, 1110))))
    assert slope.max() <= math.pi / 1000 * 1.7 if name != "inverse_sqrt" else slope.max() <= 0.5 / 100


def test_linear_and_cosine_are_the_published_formulas() -> None:
    """Else the two schedules of every paper would not be those of the paper, to the last digit."""
    for peak, W, T, m in [
        (1e-6, 2, 10, 0.0),
        (10.0, 100, 10000, 0.1),
        (3e-4, 0, 100, 0.0),
        (3e-4, 95, 100, 0.1),
        (1.0, 1, 1, 0.0),
    ]:
        for name in ("linear", "cosine"):
            s = make(name, f"{W} steps", f"{T} steps", peak=peak, floor=m)
            f = s.multipliers(range(T + 3))
            for k in range(T + 3):
                x = min((k - W) / max(T - W, 1), 1)
                g = 1 - x if name == "linear" else (1 + math.cos(math.pi * x)) / 2
                expected = k / W if k < W else m + (1 - m) * g
                assert abs(f[k] - expected) <= 1e-15
            assert s.lr(T // 2) == peak * f[T // 2]


def test_first_update_is_not_wasted_and_peak_comes_once() -> None:
    """Else the first update would train at 0, or the peak be held twice, as elsewhere."""
    s = make("cosine", warmup="4 steps", horizon="10 steps", floor=0.1)
    assert s(1) == 0.25 and s(4) == 1.0 and s(10) == 0.1 and s(11) == 0.1
    assert (s.multipliers(range(12)) == 1).sum() == 1


def test_import_brings_no_torch() -> None:
    """Else previews on a login node would take seconds, and fail where torch is broken."""
    code = "import sys, llmtrain.schedules, llmtrain.schedules.adapters; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
