"""`llmtrain lr-find` tells where training breaks, recommends peaks below it, and leaves everything as it was."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import yaml

from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import load_config, parse_yaml
from llmtrain.data.batches import Batch, TrainBatches
from llmtrain.data.dataset import open_data
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT
from llmtrain.errors import CheckpointError, ConfigError, DivergenceError
from llmtrain.train import rng
from llmtrain.train.feed import train_batches
from llmtrain.train.range_test import RangeTest, find_edge, peaks_to_sweep, range_test
from llmtrain.train.start import InitialValues
from tests import ranks
from tests.test_average import content
from tests.test_resume import ENGINES
from tests.test_train import train_here

KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)


def drawing(feed: TrainBatches) -> Callable[[int], list[Batch]]:
    """The batches of each update; to read one takes a random number of every kind."""

    def batches(k: int) -> list[Batch]:
        random.random()
        np.random.random()
        torch.rand(1)
        return feed.update(k)

    return batches


def leave_no_trace(configs: dict[str, Config], output: Path) -> None:
    """One rank that tests each engine to its breaking and beyond, in the middle of a training, and trains on."""
    with open_world(60, collectives="single" not in configs) as world:
        torch.set_float32_matmul_precision("medium")
        for name, config in configs.items():
            data = open_data(config.data.path)
            feed = train_batches(config, world, data)
            engine = build_engine(config, world)

            outcomes = []
            for test in (True, False):
                engine.load(InitialValues(config), 0)
                rng.seed_generators(7, world.rank)
                engine.train_step(feed.update(1), 0.5)
                if test:
                    before, generators = content(engine.state(), *KINDS), rng.capture(world.device)
                    found = range_test(engine, drawing(feed), np.geomspace(1e-3, 1e20, 24).tolist(), 0.01)
                    assert found.edge is not None and len(found.losses) > 2, f"{name}: {found}"
                    assert content(engine.state(), *KINDS) == before, name
                    assert rng.capture(world.device) == generators, name
                    assert engine.state().update == 1
                rows = [engine.train_step(feed.update(k), 0.5) for k in (2, 3)]
                shown = [(row.loss.item(), row.grad_norm.item()) for row in rows]
                outcomes.append((shown, content(engine.state(), *KINDS)))
            assert outcomes[0] == outcomes[1], name
        (output / f"done_{world.rank}").touch()
        world.barrier()


@pytest.mark.parametrize("names", [("single",), ("fsdp", "zero1", "zero3")], ids=["one rank", "two ranks"])
def test_a_test_leaves_no_trace_in_an_engine(prepared: dict[str, Any], tmp_path: Path, names: tuple[str, ...]) -> None:
    """A run that is tested on the way would go on from broken weights."""
    path, output = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(prepared))
    configs = {name: load_config(path, ["engine.precision=bf16", *ENGINES[name]]) for name in names}
    if names == ("single",):
        output.mkdir()
        leave_no_trace(configs, output)
    else:
        ranks.start(output, 2, leave_no_trace, configs, output).succeeded()
    assert len(list(output.glob("done_*"))) == (1 if names == ("single",) else 2)


class Breaking:
    """An engine whose loss falls with the rates it is given, and rises once one is above `edge`."""

    def __init__(self, edge: float, noise: float = 0.02, broken: float = math.inf) -> None:
        self.world = type("Alone", (), {"device": torch.device("cpu")})()
        self.edge, self.noise, self.broken = edge, noise, broken
        self.generator = np.random.default_rng(0)
        self.loss = 6.0

    def state(self) -> Any:
        return type("Empty", (), {"slices": [], "update": 0, "_replace": lambda self, slices: self})()

    def load(self, source: Any, update: int) -> None:
        pass

    def train_step(self, batches: Any, multiplier: float, decay: float) -> Any:
        assert decay == 0.0
        rate = 3e-4 * multiplier
        loss = self.loss + self.noise * float(self.generator.standard_normal())
        if rate > self.broken:
            loss = math.nan
        self.loss += min(2.0, rate / self.edge) if rate > self.edge else -min(0.2, 20 * rate)
        tensors = torch.tensor(loss), torch.tensor(1.0)
        return type("Stats", (), {"loss": tensors[0], "grad_norm": tensors[1]})()


def found_in(engine: Any, low: float = 1e-7, high: float = 10.0, updates: int = 100) -> RangeTest:
    return range_test(engine, lambda k: [], np.geomspace(low, high, updates).tolist(), 3e-4)


@pytest.mark.parametrize("edge", [1e-4, 3e-3, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_the_edge_is_where_the_loss_rises(edge: float, noise: float) -> None:
    """The peaks that are recommended would all diverge, or all be far too small."""
    found = found_in(Breaking(edge, noise))
    assert found.edge is not None
    assert edge / 3 < found.edge < edge * 3
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 100
    assert "more than 1.25 times its best" in found.ended


def test_a_loss_that_never_rises_has_no_edge() -> None:
    """The largest rate that was tried would pass for the largest that holds."""
    found = found_in(Breaking(edge=1e9), high=1e-3)
    assert found.edge is None and len(found.rates) == 100
    assert found.ended == "all 100 updates were made"


def test_a_loss_that_is_not_finite_ends_the_test() -> None:
    """A test would go on for hours on numbers that mean nothing."""
    found = found_in(Breaking(edge=1e9, broken=1e-2))
    assert found.rates[-1] == pytest.approx(1e-2, rel=0.25)
    assert found.edge is not None and 5e-3 < found.edge < 1e-2
    assert "were not finite" in found.ended
    with pytest.raises(DivergenceError, match="is nan before the first update"):
        found_in(Breaking(edge=1e9, broken=0.0))


def test_recommended_peaks_double_well_below_the_edge() -> None:
    """A sweep would begin where training breaks."""
    for edge in (0.9, 3e-2, 1.234e-5):
        peaks = peaks_to_sweep(edge)
        assert len(peaks) == 4
        assert 0.95 * edge / 30 < peaks[0] and peaks[-1] < edge / 3
        np.testing.assert_allclose(np.diff(np.log2(peaks)), 1, atol=0.08)


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    return {
        str(path.relative_to(folder)): (xxhash.xxh3_128_hexdigest(path.read_bytes()), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_command_recommends_and_writes_nothing_into_the_run(
    prepared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that exists would be changed by a look at its config, or a study file not take what was recommended."""
    run = tmp_path / "run"
    train_here(prepared, run, "run.stop_at=5 steps")
    before = hashes(run)
    config, png = tmp_path / "run.yaml", tmp_path / "figures/edge.png"
    words = ["lr-find", "--config", str(config), "--set", f"run.dir={run}", "--from", "1e-5", "--updates", "40"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--png", str(png)])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    peaks = parse_yaml(next(line for line in out.splitlines() if line.startswith("peaks:")), "out")["peaks"]
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([*words, "--json", "--from-checkpoint", f"{run}@5"])
    found = json.loads(capsys.readouterr().out)
    assert hashes(run) == before
    for own in (peaks, found["peaks"]):
        assert len(own) == 4 and 1e-4 < own[0] < own[-1] < 0.1
    assert found["rates"][0] == pytest.approx(1e-5) and found["ended"]
    assert found["losses"][0] < math.log(400) - 0.2, "it did not start from the checkpoint"


def test_a_test_that_cannot_be_made_is_refused(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user would wait for an edge of another model, or of nothing."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prepared))
    config = load_config(path)
    words = {"low": 1e-7, "high": 10.0, "updates": 100, "prepare_command": "llmtrain prepare"}
    with pytest.raises(ConfigError, match=r"--from 1 --to 0\.1 --updates 100: wanted 0 < from < to"):
        find_edge(config, **{**words, "low": 1.0, "high": 0.1})
    with pytest.raises(ConfigError, match="20 updates or more"):
        find_edge(config, **{**words, "updates": 10})
    train_here(prepared, tmp_path / "other", "run.stop_at=1 steps", "model.num_layers=1")
    with pytest.raises(CheckpointError, match="of another model than the config's"):
        find_edge(config, **words, from_checkpoint=f"{tmp_path / 'other'}@1")
