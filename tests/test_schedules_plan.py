"""Does a config become the schedule it describes, in any unit and from any file, and is a mistake in it refused?"""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import ScheduleConfig
from llmtrain.errors import ScheduleError
from llmtrain.schedules import Schedule, catalog, plan, registry

NEEDED: dict[str, dict[str, Any]] = {
    "piecewise": {"knots": [["0%", 0.0], ["10%", 1.0], ["100%", 0.0]]},
    "refined": {"norms": [2.0, 1.0, 1.0, 1.5]},
    "chain": {"pieces": [{"name": "constant", "length": "50%"}, {"name": "cosine"}]},
}


def make(name: str, warmup: Any = "0 steps", horizon: Any = "100 steps", tokens: int = 1000, **keys: Any) -> Schedule:
    keys = {"floor": 0.1, "peak": 3e-4, **NEEDED.get(name, {}), **keys}
    return plan(ScheduleConfig(name=name, warmup=warmup, horizon=horizon, **keys), tokens_per_update=tokens)


def test_token_horizon_is_exact_over_tokens() -> None:
    """Else a curve written in tokens would drift from the tokens the run has seen."""
    s = make("linear", warmup="0 steps", horizon="1000 tokens", tokens=300, floor=0.0)
    assert s.total_updates == 4
    assert s.multipliers([0, 1, 2, 3, 4, 5]).tolist() == [1.0, 1 - 300 / 1000, 1 - 600 / 1000, 1 - 900 / 1000, 0.0, 0.0]
    big = make("linear", warmup="1%", horizon="100T tokens", tokens=4 * 2**20, floor=0.0)
    k = 12_345_678
    assert big(k) == 1 - (k * 4 * 2**20 - 10**12) / (10**14 - 10**12)


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "multistep", "inverse_sqrt"]),
    tokens=st.integers(1, 5000),
    after=st.integers(0, 80),
)
def test_changing_the_batch_leaves_the_curve_over_tokens_alone(name: str, tokens: int, after: int) -> None:
    """Else doubling the global batch in mid-run would bend a schedule that was written in tokens."""
    s = make(name, warmup=f"{10 * tokens} tokens", horizon=f"{100 * tokens} tokens", tokens=tokens)
    doubled = s.with_batch(after, 2 * tokens)
    for k in range(after + 1):
        assert doubled(k) == s(k)
    for j in range(1, 60):
        assert doubled(after + j) == s(after + 2 * j)
    assert doubled.total_updates == after + math.ceil((100 - after) / 2)
    assert Schedule.from_spec(doubled.spec) == doubled != s
    again = doubled.with_batch(after + 3, tokens)
    assert [again(after + 3 + j) for j in range(90)] == [s(after + 6 + j) for j in range(90)]


def test_step_horizon_ignores_the_batch() -> None:
    """Else a schedule written in steps would refuse a resume for a batch that it does not depend on."""
    s = make("cosine", warmup="10 steps", tokens=1000)
    assert s.with_batch(5, 2000) == s
    assert make("cosine", warmup="10 steps", tokens=2000) == s


def test_lengths_convert_between_units() -> None:
    """Else "1%", "8B tokens" and "2000 steps" would not mean the same length."""
    in_steps = make("wsd", "2050 tokens", "1000 steps", tokens=1000, decay="10%")
    assert in_steps.warmup_updates == 3 and in_steps(900) == 1 > in_steps(901)
    in_tokens = make("wsd", "3 steps", "1M tokens", tokens=1000, decay="100 steps")
    assert in_tokens.warmup_updates == 3 and in_tokens(900) == 1 > in_tokens(901)
    assert make("cosine", "0.1%", "1000 steps").warmup_updates == 1


def test_automatic_warmup_follows_beta2() -> None:
    """Else `warmup: auto` would be a step short by rounding, or eat a short run."""
    for beta2, T, expected in [
        (0.95, 1000, 40),
        (0.98, 10**4, 100),
        (0.999, 10**5, 2000),
        (0.95, 10**6, 10**4),
        (0.999, 1000, 100),
    ]:
        config = ScheduleConfig(name="cosine", peak=1.0, warmup="auto", horizon=f"{T} steps")
        assert plan(config, 1000, beta2).warmup_updates == expected
    tokens = ScheduleConfig(name="cosine", peak=1.0, warmup="auto", horizon="1M tokens")
    assert plan(tokens, 1000, 0.95).warmup_updates == 40


def test_shapes_of_several_phases_by_hand() -> None:
    """Else a phase would begin an update early or late, or aim at another level than its docstring says."""
    half, quarter = 0.5, (1 + math.sqrt(0.5)) / 2  # of a half cosine wave, at x = 1/2 and 1/4
    cases: list[tuple[str, dict[str, Any], dict[int, float]]] = [
        (
            "wsd_s",
            {"cycles": 2, "decay_share": 0.2},
            {0: 1, 40: 1, 45: 0.55, 50: 0.1, 51: 1, 90: 1, 95: 0.55},
        ),
        ("wsd_s", {"ends": ["20%"], "decay_share": 0.5, "cooldown": "harmonic"}, {10: 1, 15: 2 / 11, 20: 0.1, 60: 1}),
        ("infinite", {"cooldown": "20%", "level": 0.5}, {0: 1, 10: 0.5 + 0.5 * half, 20: 0.5, 100: 0.5}),
        (
            "infinite",
            {"cooldown": "40%", "level": 0.5, "curve": "rsqrt", "anneal": "20%"},
            {10: (1 + 0.75) ** -0.5, 40: 0.5, 80: 0.5, 90: math.sqrt(0.05), 100: 0.1},
        ),
        (
            "rewarm",
            {"first": "40%", "rise": "10%", "level": 0.6},
            {20: 0.1 + 0.9 * half, 40: 0.1, 45: 0.35, 50: 0.6, 75: 0.1 + 0.5 * half, 100: 0.1},
        ),
        (
            "cosine_linear",
            {"tail": "50%", "floor": 0.0},
            {25: 0.1 + 0.9 * quarter, 50: 0.55, 75: 0.275},
        ),
        (
            "sgdr",
            {"cycles": 2, "shrink": 0.5, "floor": 0.0},
            {25: half, 50: 0.5, 75: half / 2, 100: 0},
        ),
        ("power", {"exponent": 1.0, "knee": "20%", "tail": "20%", "floor": 0.0}, {20: 1, 40: 0.5, 80: 0.25, 90: 0.125}),
    ]
    for name, keys, values in cases:
        s = make(name, **keys)
        assert s.multipliers(list(values)) == pytest.approx(list(values.values()), abs=1e-12), name


def test_warmups_for_range_tests_and_from_deepspeed() -> None:
    """Else a learning-rate range test would not rise by equal factors, or DeepSpeed's logarithm start elsewhere."""
    s = make("constant", "10 steps", warmup_shape="geometric", warmup_start=1e-4)
    assert s.multipliers([0, 5, 10]) == pytest.approx([1e-4, 1e-2, 1.0], rel=1e-12)
    s = make("constant", "8 steps", warmup_shape="log")
    assert s.multipliers([0, 1, 2, 4, 8]) == pytest.approx([0, 0, 1 / 3, 2 / 3, 1], abs=1e-12)


def test_decayed_means_annealed() -> None:
    """Else a report would rank a loss at a high learning rate against annealed ones."""
    cosine = make("cosine", "10 steps")
    assert [cosine.decayed(k) for k in (1, 10, 99, 100, 101)] == [False, False, False, True, True]
    assert not make("constant").decayed(100) and not make("inverse_sqrt", "10 steps").decayed(100)
    assert not make("cosine", floor=1.0).decayed(100)
    assert not make("infinite").decayed(100) and make("infinite", anneal="10%").decayed(100)
    assert [make("wsd_s", cycles=2).decayed(k) for k in (49, 50, 51, 100)] == [False, True, False, True]
    assert [make("multistep").decayed(k) for k in (89, 90, 91)] == [False, False, True]
    assert make("cosine", "10 steps", convention="hf").decayed(100)
    drawn = make("piecewise", knots=[["0%", 0.0], ["10%", 0.0], ["20%", 1.0], ["90%", 0.0]])
    assert [drawn.decayed(k) for k in (0, 1, 10, 20, 89, 90, 100)] == [False] * 5 + [True] * 2
    assert not make("linear", "100 steps").decayed(100)
    warming = make("linear", "50 steps", floor=0.1)
    assert warming(5) == 0.1 and not warming.decayed(5)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"name": "cosin"}, 'did you mean "cosine"'),
        ({"name": "cosine", "exponant": 2.0}, 'did you mean "exponent"'),
        ({"name": "cosine", "warmpu": "5 steps"}, 'did you mean "warmup"'),
        ({"name": "cosine", "convetion": "hf"}, 'did you mean "convention"'),
        ({"name": "cosine", "exponent": "2"}, "schedule.exponent is '2', wanted float"),
        ({"name": "cosine", "exponent": 0.0}, "above 0"),
        ({"name": "wsd", "decay": 200}, 'write "200 steps"'),
        ({"name": "wsd", "decay": "95%", "warmup": "10%"}, "shorten one of them"),
        ({"name": "wsd", "cooldown": "squared"}, 'did you mean "square"'),
        ({"name": "wsd", "cooldown": "harmonic", "floor": 0.0}, "floor above 0"),
        ({"name": "exponential", "floor": 0.0}, "floor above 0"),
        ({"name": "cosine", "warmup_shape": "linaer"}, 'did you mean "linear"'),
        ({"name": "cosine", "warmup_start": 2.0}, "from 0 to 1"),
        ({"name": "cosine", "warmup_shape": "geometric"}, "warmup_start above 0"),
        ({"name": "cosine", "convention": "HF"}, "known: deepspeed"),
        ({"name": "rewarm", "convention": "hf"}, "convention hf has no schedule rewarm"),
        ({"name": "cosine", "convention": "hf", "horizon": "1M tokens"}, "horizon in steps"),
        ({"name": "piecewise", "knots": None}, "wanted pairs"),
        ({"name": "piecewise", "knots": [["5 steps", 1.0], ["5 steps", 0.0]]}, "must rise"),
        ({"name": "piecewise", "knots": "no_such.csv"}, "cannot read no_such.csv"),
        ({"name": "piecewise", "warmup": "5 steps"}, "its own warm-up"),
        ({"name": "refined", "norms": [1.0, 0.0]}, "above 0"),
        ({"name": "chain", "pieces": [{"name": "linear"}, {"name": "linear"}]}, "only the last piece"),
        ({"name": "chain", "pieces": [{"name": "linear", "length": "50%"}]}, "the lengths must together"),
        ({"name": "multistep", "drops": ["90%", "80%"]}, "must rise"),
        ({"name": "multistep", "drops": ["5%", "80%"], "warmup": "10%"}, "inside the warm-up"),
        ({"name": "wsd_s", "cycles": 200}, "wanted 1 to the 100 left"),
        ({"name": "wsd_s", "ends": ["90%", "80%"]}, "must rise"),
        ({"name": "rewarm", "first": "100%"}, "must follow one another"),
        ({"name": "infinite", "level": 0.05}, "must not be below the floor"),
        ({"name": "sgdr", "lengthen": 1e5, "cycles": 100}, "cannot be read"),
        ({"name": "cosine", "convention": "hf", "warmup_start": 0.5}, "no schedule.warmup_start"),
        ({"name": "cosine", "convention": "litgpt", "accumulation": 0}, "micro-batches"),
        ({"name": "cosine", "convention": "deepspeed"}, "at least 2 updates"),
        ({"name": "cosine", "warmup": "2000 tokens", "horizon": "1 steps"}, "is longer than"),
        ({"name": "cosine", "module": "no_such.py"}, "there is no file"),
    ],
)
def test_a_mistake_is_refused_with_its_remedy(keys: dict[str, Any], wanted: str) -> None:
    """Else a typo would run for days on a default, or end in a traceback."""
    name = keys["name"]
    with pytest.raises(ScheduleError, match=None) as caught:
        make(**{**NEEDED.get(name, {}), **keys})
    assert wanted in str(caught.value)


@pytest.mark.parametrize("missing", ["piecewise", "refined", "chain"])
def test_required_parameter_is_asked_for(missing: str) -> None:
    """Else a schedule without its knots, norms or pieces would fail later, in the middle of a run."""
    with pytest.raises(ScheduleError, match=f"{missing} needs"):
        plan(ScheduleConfig(name=missing, peak=1.0, horizon="10 steps"), 1)


def test_damaged_spec_is_refused() -> None:
    """Else a checkpoint of another version would go on with another learning rate."""
    good = make("cosine", "10 steps").spec
    bad: list[Any] = [
        {**good, "name": "nosuch"},
        {**good, "version": 2},
        {**good, "extra": 1},
        {**good, "params": {**good["params"], "extra": 1}},
        {**good, "params": {**good["params"], "shape": {"exponent": 1.0, "theta": 1.0, "x": 2}}},
        {**good, "params": {**good["params"], "shape": {"exponent": 1.0}}},
        {**good, "params": {**good["params"], "warmup": 200}},
        {**good, "params": {**good["params"], "warmup": "10"}},
        {**good, "params": {**good["params"], "unit": "epochs"}},
        {**good, "params": {**good["params"], "clock": [[0, 0, 1]]}},
        {**good, "params": []},
        {"name": "extend", "version": 1, "params": {"before": good, "at": 3}},
        [],
    ]
    for spec in bad:
        with pytest.raises(ScheduleError):
            Schedule.from_spec(spec)


def test_knots_and_norms_come_from_files(tmp_path: Any) -> None:
    """Else a curve drawn in a spreadsheet, or the log of a pilot run, could not be trained on."""
    table = tmp_path / "knots.csv"
    table.write_text("percent, multiplier\n0,0\n10,1\n100,0.5\n")
    s = make("piecewise", knots=str(table), floor=0.0)
    assert s.multipliers([0, 5, 10, 55, 100, 200]).tolist() == [0, 0.5, 1, 0.75, 0.5, 0.5]
    table.unlink()
    assert Schedule.from_spec(s.spec)(55) == 0.75
    held = make("piecewise", knots=[["0 steps", 1.0], ["10 steps", 0.5]], between="hold", floor=0.0)
    assert held.multipliers([9, 10, 11]).tolist() == [1, 0.5, 0.5]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"update": k, "grad_norm": 2.5}) + "\n" for k in range(1, 500)) + '{"val": 1}\n')
    flat = make("refined", norms=str(log), floor=0.0)
    assert flat.multipliers(range(101)) == pytest.approx(1 - np.arange(101) / 100, abs=1e-12)


def test_refined_rises_where_gradients_shrink() -> None:
    """Else refinement would not find the warm-up that a pilot run's early, large gradients ask for."""
    s = make("refined", norms=[5.0] * 10 + [1.0] * 90, smooth=0.0, horizon="1000 steps", floor=0.0)
    assert s(50) < 0.3 < s(105) and s.multipliers(range(1001)).max() == pytest.approx(1.0, abs=0.02)
    sgd = make("refined", norms=[5.0] * 10 + [1.0] * 90, smooth=0.0, horizon="1000 steps", floor=0.0, optimizer="sgd")
    assert sgd(50) < s(50) / 3


def test_chain_joins_pieces_at_their_levels() -> None:
    """Else DeepSeek-V3's constant, cosine and two constants could not be written."""
    pieces = [
        {"name": "constant", "length": "60 steps"},
        {"name": "cosine", "length": "20 steps", "end": 0.1},
        {"name": "constant", "length": "10 steps"},
        {"name": "constant", "start": 0.03},
    ]
    s = make("chain", "5 steps", "105 steps", pieces=pieces, floor=0.0)
    assert s.multipliers([5, 65, 75, 85, 95, 96, 105]) == pytest.approx([1, 1, 0.55, 0.1, 0.1, 0.03, 0.03], abs=1e-15)
    assert s(65) == 1 and s(85) == 0.1 and s.decayed(105)


def test_users_file_adds_a_schedule(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a new shape would need a change to llmtrain."""
    monkeypatch.setattr(registry, "_SHAPES", dict(registry._SHAPES))  # other tests ask for all that are registered
    file = tmp_path / "mine.py"
    file.write_text(
        "from llmtrain.schedules import Progress, Units, register_schedule\n"
        "@register_schedule('test_square')\n"
        "def square(at: Progress, *, power: float = 2.0, wait: Units = '10%'):\n"
        "    return 1 - at.x**power\n"
    )
    s = make("test_square", "10 steps", module=str(file), power=3.0, floor=0.5)
    assert s(10) == 1.0 and s(55) == 0.5 + 0.5 * (1 - 0.125) and s(100) == 0.5
    assert s.spec["params"]["shape"] == {"power": 3.0, "wait": 10} and "module" not in s.canonical
    make("test_square", "10 steps", module=str(file))
    for text, wanted in [
        ("1/0", "ZeroDivisionError"),
        ("@register_schedule('cosine')\ndef f(at): return at.x\n", "exists"),
        ("@register_schedule('test_2')\ndef f(at, power=1.0): return at.x\n", "keyword"),
    ]:
        file.write_text("from llmtrain.schedules import register_schedule\n" + text)
        with pytest.raises(ScheduleError, match=wanted):
            make("cosine", module=str(file))


def test_every_schedule_documents_itself() -> None:
    """Else `schedule list` would show a name or a parameter that nobody explains."""
    for shape in catalog():
        if not shape.name.startswith("test_"):
            assert len(shape.doc) > 40, shape.name
            assert not [name for name in shape.parameters if f"{name}:" not in shape.doc.replace(",", ":")], shape.name
