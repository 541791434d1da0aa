"""Each group of parameters gets its own learning rate and weight decay, on every engine, in every update."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.data.batches import IGNORE, Batch
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import WEIGHT
from llmtrain.errors import ConfigError
from llmtrain.model.initial import parameter_shapes
from llmtrain.schedules import plan
from llmtrain.train.metrics import read_metrics
from llmtrain.train.run import decay_multiplier
from llmtrain.train.start import InitialValues
from tests import ranks
from tests.test_resume import history
from tests.test_schedule_contract import Runs

FACTORS = {"embed": 2.0, "head": 0.5, "norm": 0.25}
DECAY = {"name": "linear", "horizon": "20 steps", "floor": 0.5}


def changed(prepared: dict[str, Any], engine: dict[str, Any], **optim: Any) -> Config:
    """The small config with these optimizer settings on that engine."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(prepared))
    return validate({**values, "optim": optim, "engine": {**values["engine"], **engine}}, "config")


def empty_batch() -> Batch:
    """A batch without a valid target: its gradients are zero, so an update only decays."""
    tokens = torch.arange(64).reshape(2, 32) % 300
    return Batch(tokens, torch.full_like(tokens, IGNORE))


def decay_only(config: Config, output: Path) -> None:
    """Make three updates that only decay; write the groups' settings and what is left of each parameter."""
    schedule, decay = plan(config.schedule, config.batch.tokens), decay_multiplier(config, [[0, 0, 8]])
    with open_world(60, collectives=True) as world:
        engine = build_engine(config, world)
        engine.load(InitialValues(config), 0)
        kinds, rates = [], []
        for k in (1, 2, 3):
            accumulated = [empty_batch()] * config.batch.accumulation(world.size)
            stats = engine.train_step(accumulated, schedule(k), decay(k))
            groups = engine.optimizer.param_groups  # type: ignore[attr-defined]
            kinds.append(sorted({(group["lr"], group["weight_decay"]) for group in groups}))
            rates.append([stats.lr, stats.weight_decay])
        found: dict[str, tuple[float, float]] = {}
        for piece in engine.state().slices:
            if piece.start < piece.stop:
                was = InitialValues(config).read(piece.name, WEIGHT, piece.start, piece.stop)
                found[piece.name] = (piece.tensors[WEIGHT].cpu().double().norm().item(), was.double().norm().item())
        (output / f"rates_{world.rank}.json").write_text(json.dumps([kinds, rates, found]))
        world.barrier()


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(
    ("count", "engine"),
    [
        (1, {"kind": "single"}),
        (2, {"kind": "fsdp"}),
        (2, {"kind": "deepspeed", "zero_stage": 1}),
        (2, {"kind": "deepspeed", "zero_stage": 3}),
    ],
)
def test_every_group_gets_its_rate_and_its_decay(
    prepared: dict[str, Any], tmp_path: Path, count: int, engine: dict[str, Any], independent: bool
) -> None:
    """A factor or a decay would reach other parameters than it was written for, or none, on one of the engines."""
    config = changed(
        prepared,
        engine,
        lr_factors=FACTORS,
        weight_decay=0.4,
        weight_decay_schedule=DECAY,
        independent_weight_decay=independent,
        decay_embeddings=True,
    )
    ranks.start(tmp_path, count, decay_only, config, tmp_path).succeeded()
    f = [plan(config.schedule, 256)(k) for k in (1, 2, 3)]
    g = [1 - 0.5 * k / 20 for k in (1, 2, 3)]
    for rank in range(count):
        kinds, rates, found = json.loads((tmp_path / f"rates_{rank}.json").read_text())
        for index, groups in enumerate(kinds):
            wanted = []
            for factor, decay in ((1.0, 0.4), (2.0, 0.4), (0.5, 0.4), (0.25, 0.0)):
                per_rate = 0.01 * factor if independent else 1.0
                wanted.append([0.01 * f[index] * factor, decay * g[index] / per_rate])
            assert groups == [pytest.approx(pair, rel=1e-12) for pair in sorted(wanted)]
            assert rates[index] == pytest.approx(wanted[0], rel=1e-12)
        assert rank or {"embed.weight", "blocks.0.attention_norm.weight"} <= set(found)
        for name, (is_now, was) in found.items():
            kind = "norm" if name.endswith("norm.weight") else name.removesuffix(".weight")
            left = 1.0
            for k in range(3):
                rate = f[k] if independent else 0.01 * FACTORS.get(kind, 1.0) * f[k]
                left *= 1 - rate * (0.0 if kind == "norm" else 0.4 * g[k])
            assert is_now / was == pytest.approx(left, rel=1e-6), name


def test_independent_decay_does_not_know_the_peak(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A search for the peak would search over the decay too."""
    shrunk = []
    for peak in (0.001, 0.1):
        output = tmp_path / str(peak)
        output.mkdir()
        config = changed(
            {**prepared, "schedule": {**prepared["schedule"], "peak": peak}}, {}, independent_weight_decay=True
        )
        ranks.start(output, 1, decay_only, config, output).succeeded()
        now, was = json.loads((output / "rates_0.json").read_text())[2]["blocks.1.ffn.w_down.weight"]
        shrunk.append(now / was)
    assert shrunk[0] == pytest.approx(shrunk[1], rel=1e-6) and shrunk[0] < 0.95


def test_nothing_changes_where_nothing_is_asked_for(prepared: dict[str, Any]) -> None:
    """A run of an older config would get other groups, and so another flat layout on disk."""
    config = changed(prepared, {})
    with open_world(60, collectives=False) as world:
        groups = build_engine(config, world).optimizer.param_groups  # type: ignore[attr-defined]
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1.0, 0.1), (1.0, 0.0)]
    assert sum(len(group["params"]) for group in groups) == len(parameter_shapes(config.model))


def test_a_scheduled_decay_is_logged_and_resumed_exactly(tmp_path: Path, prepared: dict[str, Any]) -> None:
    """The first update after a resume would be made with another weight decay than the run never stopped."""
    runs = Runs(tmp_path, prepared)
    words = tuple(f"optim.weight_decay_schedule.{key}={value}" for key, value in DECAY.items())
    words = (*words, "optim.lr_factors.embed=3.0")
    runs.must(tmp_path / "straight", "single", 8, *words)
    for stop in (3, 8):
        runs.must(tmp_path / "legs", "single", stop, *words)
    assert history(tmp_path / "legs") == history(tmp_path / "straight")
    logged = [row["weight_decay"] for row in read_metrics(tmp_path / "legs") if row["kind"] == "step"]
    assert logged == pytest.approx([0.1 * (1 - 0.5 * k / 20) for k in range(1, 9)], rel=1e-12)
    code, text = runs.leg(tmp_path / "legs", "single", 9, *words, "optim.lr_factors.embed=1.0")
    assert code == 2 and "optim.lr_factors.embed: there 3.0, in this config 1.0" in text


@pytest.mark.parametrize(
    ("optim", "wanted"),
    [
        ({"weight_decay": 0.0, "weight_decay_schedule": DECAY}, "which is 0"),
        ({"weight_decay_schedule": {**DECAY, "peak": 0.3}}, "peak is weight_decay"),
        ({"lr_factors": {"embedding": 2.0}}, "lr_factors.embedding"),
    ],
)
def test_a_decay_that_cannot_be_is_refused(prepared: dict[str, Any], optim: dict[str, Any], wanted: str) -> None:
    """A mistyped factor or schedule would be trained without."""
    with pytest.raises(ConfigError, match=wanted):
        changed(prepared, {}, **optim)


def test_a_tied_head_has_no_factor_of_its_own(prepared: dict[str, Any]) -> None:
    """A factor written for a head that is the embedding would have no effect."""
    tied = {**prepared, "model": {**prepared["model"], "tie_embeddings": True}}
    with pytest.raises(ConfigError, match=r"write optim\.lr_factors\.embed"):
        changed(tied, {}, lr_factors={"head": 2.0})
