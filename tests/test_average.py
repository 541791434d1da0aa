"""An average of the weights shapes no update, is saved and gone on with exactly, and is judged as what it is."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmtrain.checkpoint import convert
from llmtrain.checkpoint.flat import EMA, RANK_FILE, FlatReader, write_rank_file
from llmtrain.checkpoint.places import Place
from llmtrain.checkpoint.store import open_checkpoint
from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.data.dataset import open_data
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT, FlatState
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.study.law.curves import read_curve
from llmtrain.study.record import read_record
from llmtrain.train import merge
from llmtrain.train.average import Averaging
from llmtrain.train.feed import train_batches
from llmtrain.train.merge import SHAPES, Merged, average_run, shares
from llmtrain.train.metrics import read_metrics
from llmtrain.train.saved import evaluate_run
from llmtrain.train.start import InitialValues
from tests import ranks
from tests.test_layouts import on_disk
from tests.test_resume import ENGINES, history, weights
from tests.test_train import train_here

HALF, END, WINDOW = 2, 4, 3
WORDS = ("checkpoint.every=5 steps", "checkpoint.keep=9", "validation.every=10 steps")


def whole(config: Config, folder: Path, engines: dict[str, tuple[str, ...]]) -> dict[str, Config]:
    """The config on each of these engines, in bf16: there the weights that compute are copies of those averaged."""
    path = folder / "engines.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return {name: load_config(path, ["engine.precision=bf16", *words]) for name, words in engines.items()}


def content(flat: FlatState, *kinds: str) -> dict[tuple[str, str], bytes]:
    """The bytes of this rank's slices."""
    return {
        (kind, piece.name): tensor.cpu().numpy().tobytes()
        for piece in flat.slices
        for kind, tensor in piece.tensors.items()
        if kind in kinds and tensor.numel()
    }


def reader(folder: Path) -> FlatReader:
    return FlatReader(Place(folder), sorted(path.name for path in folder.iterdir()))


def average_on_engines(configs: dict[str, Config], output: Path) -> None:
    """One rank that trains with an average and without on each engine in turn, and checks all that can be."""
    with open_world(60, collectives=True) as world:
        torch.set_float32_matmul_precision("medium")
        for name, config in configs.items():
            data = open_data(config.data.path)
            feed = train_batches(config, world, data)
            probe = feed.update(END + 1)[0]

            plain = build_engine(config, world)
            plain.load(InitialValues(config), 0)
            for k in range(1, END + 1):
                plain.train_step(feed.update(k), 0.5)
            wanted = content(plain.state(), WEIGHT, EXP_AVG, EXP_AVG_SQ)

            engine = Averaging(plain, WINDOW)
            engine.load(InitialValues(config), 0)
            assert content(engine.state(), EMA).keys() == {(EMA, key) for kind, key in wanted if kind == WEIGHT}
            slow = {piece.name: 0.0 for piece in engine.state().slices if piece.tensors}
            scores = []
            for k in range(1, END + 1):
                engine.train_step(feed.update(k), 0.5)
                for piece in engine.state().slices:
                    if piece.tensors:
                        weight = piece.tensors[WEIGHT].double().numpy()
                        slow[piece.name] += (weight - slow[piece.name]) / min(k, WINDOW)
                with engine.averaged(), engine.evaluating():
                    scores.append(engine.nats(probe))
                if k in (HALF, END):
                    world.barrier()
                    (output / f"{name}_{k}").mkdir(exist_ok=True)
                    write_rank_file(output / f"{name}_{k}" / RANK_FILE.format(world.rank), engine.state())
            assert content(engine.state(), WEIGHT, EXP_AVG, EXP_AVG_SQ) == wanted, f"{name}: it shaped the training"
            for piece in engine.state().slices:
                if piece.tensors:
                    np.testing.assert_allclose(piece.tensors[EMA].numpy(), slow[piece.name], rtol=0, atol=1e-6)
            final = content(engine.state(), EMA)
            assert all(final[EMA, key] != wanted[WEIGHT, key] for _, key in final)
            world.barrier()

            plain.load(Merged([(1.0, reader(output / f"{name}_{END}"))], EMA), END)
            with plain.evaluating():
                assert torch.equal(plain.nats(probe), scores[-1]), f"{name}: what was judged is not the average"
            engine.load(reader(output / f"{name}_{HALF}"), HALF)
            for k in range(HALF + 1, END + 1):
                engine.train_step(feed.update(k), 0.5)
            assert content(engine.state(), EMA) == final, f"{name}: not gone on with exactly"

            first = output / f"{next(iter(configs))}_{END}"
            there = on_disk(first)
            engine.load(reader(first), END)
            for piece in engine.state().slices:
                if piece.tensors:
                    assert torch.equal(piece.tensors[EMA], there[EMA, piece.name][piece.start : piece.stop])
        (output / f"done_{world.rank}").touch()
        world.barrier()


@pytest.mark.parametrize("count", [1, 2])
def test_an_average_is_exact_and_harmless_on_every_engine(prepared: dict[str, Any], tmp_path: Path, count: int) -> None:
    """Looking at an average would train another model, or after a resume it would be another average."""
    chosen = ("single", "fsdp", "zero3") if count == 1 else ("fsdp", "zero0", "zero1", "zero2", "zero3")
    engines = {name: ENGINES[name] for name in chosen}
    if count == 2:
        engines["fsdp_freed"] = (*ENGINES["fsdp"], "engine.reshard_after_forward=true")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(prepared))
    configs = whole(load_config(tmp_path / "base.yaml"), tmp_path, engines)
    output = tmp_path / "out"
    ranks.start(output, count, average_on_engines, configs, output).succeeded()
    assert len(list(output.glob("done_*"))) == count
    for name in engines:
        tensors = on_disk(output / f"{name}_{END}")
        sizes = {
            kind: sum(len(tensor) for (one, _), tensor in tensors.items() if one == kind) for kind in (WEIGHT, EMA)
        }
        assert sizes[WEIGHT] == sizes[EMA] > 0


@pytest.fixture(scope="module")
def runs(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run without an average and one with it."""
    folder = tmp_path_factory.mktemp("runs")
    train_here(prepared, folder / "plain", *WORDS)
    train_here(prepared, folder / "ema", *WORDS, "validation.ema_window=25%")
    return {name: folder / name for name in ("plain", "ema")}


def validations(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == "validation"]


def test_a_run_with_an_average_is_the_run_without(runs: dict[str, Path]) -> None:
    """The two could not be compared, or a report would take the loss of the average for that of the run."""
    assert history(runs["ema"]) == history(runs["plain"])
    saved, averaged = (on_disk(runs[name] / "checkpoints/step_00000020") for name in ("plain", "ema"))
    assert {kind for kind, _ in saved} == {WEIGHT, EXP_AVG, EXP_AVG_SQ}
    assert {kind for kind, _ in averaged} == {WEIGHT, EXP_AVG, EXP_AVG_SQ, EMA}
    assert all(averaged[key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in saved.items())

    rows = validations(runs["ema"])
    own = {"ema_loss", "ema_perplexity", "ema_nats_per_byte", "ema_window"}
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert [{key: row[key] for key in row.keys() - own} for row in rows] == validations(runs["plain"])
    assert all(own <= row.keys() and row["ema_window"] == 5 for row in rows)
    assert all(math.isclose(math.exp(row["ema_loss"]), row["ema_perplexity"]) for row in rows)
    assert rows[0]["ema_loss"] == rows[0]["loss"] and rows[1]["ema_loss"] != rows[1]["loss"]
    assert read_record(runs["ema"]).loss == read_record(runs["plain"]).loss == rows[-1]["loss"]
    assert read_curve(runs["ema"]).losses.tolist() == read_curve(runs["plain"]).losses.tolist()
    assert evaluate_run(runs["ema"])[0]["loss"] == rows[-1]["loss"]


def test_an_average_goes_on_where_the_run_does(
    prepared: dict[str, Any], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run would end with another average, or one that began late would not say so."""
    window = "validation.ema_window=25%"

    def again(name: str, source: str, *words: str) -> Path:
        """The second half of a run once more."""
        run = Path(shutil.copytree(runs[source], tmp_path / name))
        capsys.readouterr()
        train_here(prepared, run, *WORDS, *words, resume=f"{run}@10")
        return run

    assert weights(again("halves", "ema", window)) == weights(runs["ema"])
    assert "EMA of the weights over 5 updates, gone on with" in capsys.readouterr().out

    late, early = (on_disk(run / "checkpoints/step_00000020") for run in (again("late", "plain", window), runs["ema"]))
    assert "EMA of the weights over 5 updates, started from the weights of update 10" in capsys.readouterr().out
    for kind, name in early:
        assert torch.equal(late[kind, name], early[kind, name]) == (kind != EMA), (kind, name)

    assert weights(again("off", "ema")) == weights(runs["plain"])
    said = "the EMA of the weights in .*step_00000010 is left behind: validation.ema_window is null"
    assert re.search(said, capsys.readouterr().out)


def test_a_checkpoint_keeps_its_average_when_it_moves(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was moved would lose its average, or two that differ in it would pass for the same."""
    monkeypatch.setattr(convert, "PIECE", 1000)
    there = convert.convert(f"{runs['ema']}@20", str(tmp_path / "moved"), 3, lambda done, total: None)
    moved, saved = on_disk(Path(there)), on_disk(runs["ema"] / "checkpoints/step_00000020")
    assert moved.keys() == saved.keys() and all(torch.equal(moved[key], saved[key]) for key in saved)
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "diff", f"{runs['plain']}@20", f"{runs['ema']}@20", "--json"])
    assert ended.value.code == 1
    assert {row["kind"] for row in json.loads(capsys.readouterr().out)["tensors"]} == {EMA}


def test_a_window_must_be_an_update_long(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A window of nothing would divide by zero after hours of loading."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prepared))
    with pytest.raises(ConfigError, match=r'validation\.ema_window "0%" must be at least one update'):
        load_config(path, ["validation.ema_window=0%"])
    with pytest.raises(ConfigError, match=r"validation\.ema_window: 5 has no unit"):
        load_config(path, ["validation.ema_window=5"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [[10, 20], [5, 10, 15, 20], [5, 6, 11, 20]], ids=["two", "even", "uneven"])
def test_shares_stand_for_a_decay(steps: list[int], shape: Any) -> None:
    """A mean would stand for another cooldown than its name says."""
    own = shares(steps, shape)
    assert math.isclose(sum(own), 1) and min(own) >= 0
    if steps[1] - steps[0] == 5 and shape == "linear":
        np.testing.assert_allclose(own, 1 / len(steps))
    learnt = np.random.default_rng(0).standard_normal(len(steps))  # by each checkpoint since the one before
    counts = [sum(own[j:]) for j in range(len(steps))]
    merged = np.dot(own, np.cumsum(learnt))
    assert counts[0] == pytest.approx(1) and counts == sorted(counts, reverse=True)
    assert merged == pytest.approx(np.dot(counts, learnt))
    if shape == "1-sqrt" and len(steps) == 4 and steps[1] == 10:
        np.testing.assert_allclose(counts, [1, 1 - math.sqrt(1 / 4), 1 - math.sqrt(2 / 4), 1 - math.sqrt(3 / 4)])


def test_merged_weights_are_the_weighted_sum(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece would be summed from elsewhere, or rounded at every checkpoint."""
    own = shares([10, 15, 20], "1-sqrt")
    folders = [runs["plain"] / f"checkpoints/step_{step:08d}" for step in (10, 15, 20)]
    parts = [(share, open_checkpoint(folder).reader) for share, folder in zip(own, folders, strict=True)]
    whole = [on_disk(folder) for folder in folders]
    monkeypatch.setattr(merge, "PIECE", 1000)
    for name in parts[0][1].names():
        wanted = sum(share * saved[WEIGHT, name].double().numpy() for share, saved in zip(own, whole, strict=True))
        stop = len(wanted)
        found = Merged(parts).read(name, WEIGHT, stop // 3, stop)
        assert found.dtype == torch.float32
        assert found.numpy().tobytes() == wanted[stop // 3 :].astype(np.float32).tobytes()
    assert not Merged(parts).read("norm.weight", EXP_AVG, 0, 48).any()


def test_checkpoints_are_merged_and_scored(
    prepared: dict[str, Any], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user would see the loss of other weights than those that are written, or of another checkpoint."""
    found = average_run(runs["ema"])
    by_name = {row["weights"]: row for row in found.rows}
    assert found.steps == [5, 10, 15, 20]
    assert list(by_name) == ["newest", "ema", *SHAPES]
    last = validations(runs["ema"])[-1]
    assert (by_name["newest"]["loss"], by_name["ema"]["loss"]) == (last["loss"], last["ema_loss"])
    assert by_name["uniform"]["loss"] == pytest.approx(by_name["linear"]["loss"], rel=1e-6)
    assert len({row["loss"] for row in found.rows}) >= len(found.rows) - 1
    assert "the learning rate went from 0.00991 to 0.001" in found.warnings[0]

    words = ["average", str(runs["ema"]), "--steps", "20,10,15", "--shape", "cosine", "--out", str(tmp_path / "mean")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    out, _ = capsys.readouterr()
    told = json.loads(out)
    assert ended.value.code == 0 and told["steps"] == [10, 15, 20]
    (row,) = [row for row in told["rows"] if row["weights"] == "cosine"]
    assert row["shares"] == shares([10, 15, 20], "cosine")
    train_here(prepared, tmp_path / "onward", f"run.init_from={tmp_path / 'mean'}", "run.stop_at=1 steps")
    capsys.readouterr()
    started = validations(tmp_path / "onward")[0]
    assert started["loss"] == row["loss"]
    assert started["initial_weights"] == json.loads((tmp_path / "mean/import.json").read_text())["weights_hash"]
    with pytest.raises(SystemExit):
        main(["average", str(runs["plain"]), "--last", "2", "--shape", "uniform"])
    out = capsys.readouterr().out.partition("checkpoints of updates 15, 20")[2]
    assert "newest" in out and "ema" not in out
    assert re.search(r"^ ?uniform +validation +[\d.]+ +[+-]0\.\d{4} ", out, re.MULTILINE)


def test_what_cannot_be_merged_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    """A user would wait for a mean of something else, or lose a folder."""
    run = runs["plain"]
    with pytest.raises(ConfigError, match=r'--shape "linaer" is not a shape to merge with; did you mean "linear"'):
        average_run(run, shapes=["linaer"])
    with pytest.raises(CheckpointError, match=r"no checkpoint of update 11; .* of updates 5, 10, 15, 20"):
        average_run(run, steps=[10, 11])
    with pytest.raises(CheckpointError, match="wanted 2 or more to merge"):
        average_run(run, steps=[10])
    with pytest.raises(CheckpointError, match="wanted 7 or more to merge"):
        average_run(run, last=7)
    with pytest.raises(ConfigError, match="--out writes one mean: name its --shape"):
        average_run(run, out=tmp_path / "mean")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        average_run(run, shapes=["uniform"], out=tmp_path / "full")
