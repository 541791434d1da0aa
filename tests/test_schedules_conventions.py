"""Do the named conventions give the learning rates that the other frameworks really use, update by update?

The tables were printed by those frameworks' own code (peak 1, W = 4, T = 10, floor 0.1 unless said otherwise, updates
1 to 10); transformers, torch and deepspeed are also run here, as installed. The golden specs prove that a schedule
written down by an older llmtrain is still the same function.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config import ScheduleConfig
from llmtrain.schedules import Schedule, catalog, plan
from llmtrain.schedules.conventions import CONVENTIONS

COSINE_FROM_PEAK = [1.0, 0.940, 0.775, 0.550, 0.325, 0.160]
GOLDEN = sorted((Path(__file__).parent / "golden" / "schedules").glob("*.json"))


def make(name: str, W: int = 4, T: int = 10, floor: float = 0.1, **keys: Any) -> Schedule:
    config = ScheduleConfig(name=name, peak=1.0, warmup=f"{W} steps", horizon=f"{T} steps", floor=floor, **keys)
    return plan(config, tokens_per_update=1000)


@pytest.mark.parametrize(
    ("keys", "table"),
    [
        ({"name": "cosine", "convention": "hf"}, [0, 0.25, 0.5, 0.75, *COSINE_FROM_PEAK]),
        (
            {"name": "wsd", "convention": "hf", "decay": "3 steps"},
            [0.1, 0.325, 0.55, 0.775, 1, 1, 1, 1, 0.7, 0.4],
        ),
        ({"name": "cosine", "convention": "megatron"}, [0, 0.25, 0.5, 0.75, *COSINE_FROM_PEAK]),
        ({"name": "cosine", "convention": "torchtitan"}, [0.25, 0.5, 0.75, 1, *COSINE_FROM_PEAK]),
        ({"name": "cosine", "convention": "deepspeed"}, [0, 0, 0.25, 0.5, 0.75, *COSINE_FROM_PEAK[1:]]),
        (
            {"name": "constant", "convention": "deepspeed", "warmup_shape": "log"},
            [0, 0, 0.5, 0.792, 1, 1, 1, 1, 1, 1],
        ),
        (
            {"name": "linear", "convention": "deepspeed", "floor": 0.0},
            [0, 0, 0.25, 0.5, 0.75, 1, 0.833, 0.667, 0.5, 0.333],
        ),
        ({"name": "cosine", "convention": "litgpt"}, [0, 0.25, 0.5, 0.75, *COSINE_FROM_PEAK]),
        (
            {"name": "cosine", "convention": "litgpt", "accumulation": 4},
            [0.188, 0.438, 0.688, 0.938, 0.966, 0.824, 0.609, 0.378, 0.193, 0.104],
        ),
        ({"name": "cosine", "convention": "olmo"}, [0.25, 0.5, 0.75, *COSINE_FROM_PEAK, 0.1]),
        (
            {"name": "wsd", "convention": "olmo", "decay": "3 steps", "floor": 0.0},
            [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.667, 0.333, 0],
        ),
        ({"name": "cosine", "convention": "nanogpt"}, [0.2, 0.4, 0.6, 0.8, *COSINE_FROM_PEAK]),
        ({"name": "cosine"}, [0.25, 0.5, 0.75, *COSINE_FROM_PEAK, 0.1]),
    ],
)
def test_tables_measured_in_other_frameworks(keys: dict[str, Any], table: list[float]) -> None:
    """Else someone who migrates a run would change its learning rates without wanting to."""
    assert make(**keys).multipliers(range(1, 11)) == pytest.approx(table, abs=5.1e-4)


def exact_rows(W: int, T: int, m: float) -> dict[str, tuple[dict[str, Any], list[float]]]:
    """The published index arithmetic of each framework, to full precision. i counts updates from 0."""

    def cos(x: float) -> float:
        return m + (1 - m) * (1 + math.cos(math.pi * x)) / 2

    i = range(T)
    G = 4
    return {
        "hf": ({}, [n / W if n < W else cos((n - W) / (T - W)) for n in i]),
        "megatron": ({}, [n / W if n < W else cos((n - W) / (T - W)) for n in i]),
        "olmo": ({}, [(n + 1) / W if n + 1 < W else cos((n + 1 - W) / (T - W)) for n in i]),
        "torchtitan": ({}, [(n + 1) / W if n < W else cos((n - W) / (T - W)) for n in i]),
        "nanogpt": ({}, [(n + 1) / (W + 1) if n < W else cos((n - W) / (T - W)) for n in i]),
        "deepspeed": (
            {},
            [max(n - 1, 0) / W if n - 1 < W else cos((n - 1 - W + 1) / (T - W)) for n in i],
        ),
        "litgpt": (
            {"accumulation": G},
            [j / (W * G) if j < W * G else cos((j - W * G) / ((T - W) * G)) for j in ((n + 1) * G - 1 for n in i)],
        ),
    }


@pytest.mark.parametrize(("W", "T", "m"), [(4, 10, 0.1), (2, 50, 0.0), (100, 1000, 0.01)])
@pytest.mark.parametrize("convention", sorted(exact_rows(4, 10, 0.1)))
def test_cosine_of_every_convention_to_full_precision(convention: str, W: int, T: int, m: float) -> None:
    """Else a migrated run would drift from its first half in the digits that the tables do not print."""
    keys, expected = exact_rows(W, T, m)[convention]
    s = make("cosine", W, T, m, convention=convention, **keys)
    assert s.multipliers(range(1, T + 1)) == pytest.approx(expected, abs=1e-12)


def test_torchtitan_and_megatron_cooldowns() -> None:
    """Else a WSD run of torchtitan or Megatron could not be taken over in its decay."""
    W, T, D, m = 4, 20, 6, 0.1
    s = make("wsd", W, T, m, convention="torchtitan", decay=f"{D} steps", cooldown="1-sqrt")
    stable = T + 1 - D  # W + stable steps, with the virtual last step
    expected = [
        (n + 1) / W if n < W else 1.0 if n < stable else m + (1 - m) * (1 - math.sqrt((n + 1 - stable) / D))
        for n in range(T)
    ]
    assert s.multipliers(range(1, T + 1)) == pytest.approx(expected, abs=1e-12)
    s = make("wsd", W, T, m, convention="megatron", decay=f"{D} steps", cooldown="half-life")
    expected = [n / W if n < W else m + (1 - m) * (2 * 0.5 ** (max(n - (T - D), 0) / D) - 1) for n in range(T)]
    assert s.multipliers(range(1, T + 1)) == pytest.approx(expected, abs=1e-12)
    s = make("inverse_sqrt", W, T, 0.5, convention="megatron")
    expected = [n / W if n <= W else max(0.5, math.sqrt(W) / math.sqrt(n)) for n in range(T)]
    assert s.multipliers(range(1, T + 1)) == pytest.approx(expected, abs=1e-12)


def trace(scheduler: Any, optimizer: Any, updates: int) -> list[float]:
    """The learning rate that the optimizer really has at each update, stepping as the framework does."""
    lrs = []
    for _ in range(updates):
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.fixture
def sgd() -> Any:
    torch = pytest.importorskip("torch")
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


HF = [
    ("constant_with_warmup", {}, "constant", {}),
    ("linear", {"num_training_steps": 30}, "linear", {"floor": 0.0}),
    ("cosine", {"num_training_steps": 30}, "cosine", {"floor": 0.0}),
    ("cosine_with_restarts", {"num_training_steps": 30, "num_cycles": 3}, "sgdr", {"floor": 0.0, "cycles": 3}),
    ("polynomial", {"num_training_steps": 30, "lr_end": 0.1, "power": 2.0}, "polynomial", {"power": 2.0}),
    ("inverse_sqrt", {}, "inverse_sqrt", {"floor": 0.0}),
    ("inverse_sqrt", {"timescale": 11}, "inverse_sqrt", {"floor": 0.0, "timescale": "11 steps"}),
    ("cosine_with_min_lr", {"num_training_steps": 30, "min_lr_rate": 0.1}, "cosine", {}),
    ("cosine_warmup_with_min_lr", {"num_training_steps": 30, "min_lr_rate": 0.1}, "cosine", {"convention": "llmtrain"}),
    *(
        (
            "warmup_stable_decay",
            {
                "num_training_steps": 30,
                "num_decay_steps": 7,
                "min_lr_ratio": 0.1,
                "decay_type": shape,
                "warmup_type": shape,
            },
            "wsd",
            {"decay": "7 steps", "cooldown": shape, "warmup_shape": shape},
        )
        for shape in ("linear", "cosine", "1-sqrt")
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("theirs", "arguments", "name", "keys"), HF)
def test_transformers_as_installed(
    sgd: Any, theirs: str, arguments: dict[str, Any], name: str, keys: dict[str, Any]
) -> None:
    """Else `convention: hf` would not be what the installed transformers does."""
    optimization = pytest.importorskip("transformers.optimization")
    makers = {
        "constant_with_warmup": "get_constant_schedule_with_warmup",
        "linear": "get_linear_schedule_with_warmup",
        "cosine": "get_cosine_schedule_with_warmup",
        "cosine_with_restarts": "get_cosine_with_hard_restarts_schedule_with_warmup",
        "polynomial": "get_polynomial_decay_schedule_with_warmup",
        "inverse_sqrt": "get_inverse_sqrt_schedule",
        "cosine_with_min_lr": "get_cosine_with_min_lr_schedule_with_warmup",
        "cosine_warmup_with_min_lr": "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        "warmup_stable_decay": "get_wsd_schedule",
    }
    scheduler = getattr(optimization, makers[theirs])(sgd, num_warmup_steps=6, **arguments)
    s = make(name, 6, 30, **{"floor": 0.1, "convention": "hf", **keys})
    assert trace(scheduler, sgd, 30) == pytest.approx(s.multipliers(range(1, 31)).tolist(), abs=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rise", ["linear", "log"])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_deepspeed_as_installed(sgd: Any, name: str, rise: str) -> None:
    """Else `convention: deepspeed` would not be what the installed DeepSpeed does."""
    theirs = pytest.importorskip("deepspeed.runtime.lr_schedules")
    arguments = {"warmup_num_steps": 6, "warmup_type": rise}
    if name == "constant":
        scheduler = theirs.WarmupLR(sgd, warmup_max_lr=1.0, **arguments)
    elif name == "linear":
        scheduler = theirs.WarmupDecayLR(sgd, total_num_steps=30, warmup_max_lr=1.0, **arguments)
    else:
        scheduler = theirs.WarmupCosineLR(sgd, total_num_steps=30, cos_min_ratio=0.1, **arguments)
    floor = 0.1 if name == "cosine" else 0.0
    s = make(name, 6, 30, floor, convention="deepspeed", warmup_shape=rise)
    engine_steps_after_each_update = trace(scheduler, sgd, 30)
    assert engine_steps_after_each_update == pytest.approx(s.multipliers(range(1, 31)).tolist(), abs=1e-12)


def test_torch_schedulers_as_installed() -> None:
    """Else a recipe that names a torch scheduler could not be taken over. torch counts from 0: k - 1."""
    torch = pytest.importorskip("torch")
    from torch.optim import lr_scheduler as theirs

    T = 30
    pairs = [
        (lambda o: theirs.CosineAnnealingLR(o, T, eta_min=0.1), make("cosine", 0, T)),
        (lambda o: theirs.LinearLR(o, 1.0, 0.1, T), make("linear", 0, T)),
        (lambda o: theirs.PolynomialLR(o, T, power=3.0), make("polynomial", 0, T, 0.0, power=3.0)),
        (lambda o: theirs.ExponentialLR(o, 0.1 ** (1 / T)), make("exponential", 0, T)),
        (
            lambda o: theirs.CosineAnnealingWarmRestarts(o, 10, 2, eta_min=0.1),
            make("sgdr", 0, T, cycles=2, lengthen=2.0),
        ),
        (
            lambda o: theirs.OneCycleLR(
                o, 1.0, total_steps=T + 1, pct_start=7 / (T + 1), final_div_factor=4.0, div_factor=25.0
            ),
            make("one_cycle", 0, T, 0.01, rise="6 steps"),
        ),
        (
            lambda o: theirs.SequentialLR(
                o, [theirs.LinearLR(o, 0.25, 1.0, 5), theirs.CosineAnnealingLR(o, T - 5, eta_min=0.1)], [5]
            ),
            make("cosine", 5, T, warmup_start=0.25),
        ),
    ]
    for build, s in pairs:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build(optimizer)
        assert trace(scheduler, optimizer, T) == pytest.approx(s.multipliers(range(T)).tolist(), abs=1e-12), s.name
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    ours = make("multistep", 0, T, 0.0, drops=["10 steps", "20 steps"], levels=[0.1, 0.01])
    expected = trace(theirs.MultiStepLR(optimizer, [10, 20]), optimizer, T)
    assert ours.multipliers(range(1, T + 1)) == pytest.approx(expected, abs=1e-12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = trace(theirs.StepLR(optimizer, 7, 0.5), optimizer, T)
    ours = make("step", 0, T, 0.0, every="7 steps", factor=0.5)
    assert ours.multipliers(range(1, T + 1)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("file", GOLDEN, ids=[file.stem for file in GOLDEN])
def test_golden_specs_are_the_same_functions_still(file: Path) -> None:
    """Else a checkpoint written by an older llmtrain would go on at another learning rate, or not at all."""
    golden = json.loads(file.read_text())
    s = Schedule.from_spec(golden["spec"])
    assert s.hash == golden["hash"] and s.spec == golden["spec"]
    assert np.abs(s.multipliers(golden["updates"]) - golden["multipliers"]).max() <= 1e-15


def test_every_schedule_has_a_golden_spec() -> None:
    """Else a new shape could change its meaning later without a test that notices."""
    kept = {json.loads(file.read_text())["spec"]["name"] for file in GOLDEN}
    assert {shape.name for shape in catalog() if not shape.name.startswith("test_")} | {"extend", "replace"} <= kept


@pytest.mark.parametrize("convention", sorted({*CONVENTIONS} - {"deepspeed"}))  # it warms up over 2 at least
def test_a_run_without_warm_up_starts_at_the_peak_in_every_convention(convention: str) -> None:
    """A migrated run that has no warm-up could not be planned at all."""
    multipliers = make("cosine", 0, 50, convention=convention).multipliers(np.arange(1, 51))
    assert multipliers[:2].max() > 0.99
    assert np.all(np.diff(multipliers[1:]) <= 0)
