"""`llmtrain checkpoint`: what is there is told, what is wrong is named by its file, what is moved is the same."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmtrain.checkpoint import convert, inspect
from llmtrain.checkpoint.flat import FlatReader
from llmtrain.cli_checkpoint import checkpoint_app
from llmtrain.errors import CheckpointError, LlmtrainError
from tests.test_checkpoint import RANK_0, flip, truncate
from tests.test_resume import history, weights
from tests.test_train import seal, train_here

WORDS = ("checkpoint.every=5 steps", "checkpoint.ephemeral=6 steps", "checkpoint.keep=9", "schedule.horizon=20 steps")


def call(*words: object) -> tuple[int, str]:
    """The exit code of `llmtrain checkpoint ...`, and what it printed. Raises what the user would be told."""
    result = CliRunner().invoke(checkpoint_app, [str(word) for word in words])
    if isinstance(result.exception, LlmtrainError):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def runs(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three whole runs: one, one of another seed, one on another schedule."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("own", "seed", "schedule")}
    train_here(prepared, found["own"], *WORDS)
    train_here(prepared, found["seed"], *WORDS, "run.seed=8")
    train_here(prepared, found["schedule"], *WORDS, "schedule.name=linear")
    return found


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the first run, to be damaged."""
    return Path(shutil.copytree(runs["own"], tmp_path / "run"))


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A store that is no disk, empty."""
    yield "memory://moved"
    fsspec.filesystem("memory").rm("/moved", recursive=True)


def test_list_tells_what_is_there(run: Path) -> None:
    """A user could not say what a folder of checkpoints holds without opening each."""
    folder = run / "checkpoints"
    for name in ("step_00000025.tmp", "step_00000030.broken", "step_00000035.superseded"):
        (folder / name).mkdir()
    (folder / "notes").mkdir()
    shutil.copy(folder / "step_00000010/state.json", folder / "step_00000030.broken")
    code, text = call("list", run, "--json")
    rows = {row["name"]: row for row in json.loads(text)}
    assert code == 0
    assert [(row["step"], row["state"]) for row in rows.values()] == [
        (35, "superseded"),
        (30, "broken"),
        (25, "unfinished"),
        *((step, "published") for step in (20, 18, 15, 10, 5)),
    ]
    state = json.loads((folder / "step_00000010/state.json").read_text())
    assert rows["step_00000010"] == {
        "name": "step_00000010",
        "state": "published",
        "step": 10,
        "tokens": 2560,
        "lr": json.loads(history(run)[9])["lr"],
        "bytes": sum(path.stat().st_size for path in (folder / "step_00000010").iterdir()),
        "ephemeral": False,
        "saved": rows["step_00000010"]["saved"],
        "attempt": 1,
        "engine": "single",
        "ranks": 1,
    }
    assert rows["step_00000010"]["saved"].startswith("20")
    assert rows["step_00000018"]["ephemeral"] is True
    assert rows["step_00000025.tmp"]["tokens"] is None
    assert rows["step_00000030.broken"]["tokens"] == state["tokens"]
    code, text = call("list", run)
    assert code == 0
    for words in ("superseded", "ephemeral", "single x 1", "2,560"):
        assert words in text


def test_a_whole_run_is_whole(runs: dict[str, Path]) -> None:
    """A user would be sent looking for a fault that is not there."""
    for path in runs.values():
        code, text = call("check", path, "--json")
        assert (code, json.loads(text)["faults"]) == (0, [])
        assert len(json.loads(text)["checked"]) == 5
    assert call("check", runs["own"], "--step", 10) == (0, "1 checkpoint checked, 0 faults\n")
    with pytest.raises(CheckpointError, match="holds no checkpoint of update 11"):
        call("check", runs["own"], "--step", 11)


def copied(other: str, name: str) -> Callable[[Path, dict[str, Path]], Any]:
    """Damage by a file, or a whole checkpoint, of another run."""

    def harm(checkpoint: Path, runs: dict[str, Path]) -> None:
        source = runs[other] / "checkpoints" / checkpoint.name
        if name:
            shutil.copy(source / name, checkpoint / name)
        else:
            shutil.rmtree(checkpoint)
            shutil.copytree(source, checkpoint)

    return harm


def reseal_as(step: int) -> Callable[[Path, dict[str, Path]], Any]:
    def harm(checkpoint: Path, runs: dict[str, Path]) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps({**state, "step": step}))
        seal(checkpoint)

    return harm


DAMAGES: dict[str, tuple[Callable[[Path, dict[str, Path]], Any], str, str]] = {
    "truncated shard": (lambda c, _: truncate(c / RANK_0), "step_00000010", f"{RANK_0} has "),
    "flipped byte": (lambda c, _: flip(c / RANK_0), "step_00000010", f"{RANK_0} is not what was written"),
    "missing shard": (lambda c, _: (c / RANK_0).unlink(), "step_00000010", f"{RANK_0} is missing"),
    "missing state": (lambda c, _: (c / "state.json").unlink(), "step_00000010", "state.json is missing"),
    "empty manifest": (
        lambda c, _: (c / "manifest.json").write_text(""),
        "step_00000010",
        "manifest.json is not readable",
    ),
    "no manifest": (lambda c, _: (c / "manifest.json").unlink(), "step_00000010", "manifest.json is missing"),
    "stale latest": (
        lambda c, _: (c.parent / "latest").write_text("step_00000018\n"),
        "",
        'latest is stale: it names "step_00000018", the newest is step_00000020',
    ),
    "manifest of another run": (copied("seed", "manifest.json"), "step_00000010", "manifest.json is of another"),
    "state of another run": (copied("seed", "state.json"), "step_00000010", "seed is 8, in this run 7"),
    "checkpoint of another run": (copied("seed", ""), "step_00000010", "state.json is of another run: seed is 8"),
    "checkpoint of another schedule": (copied("schedule", ""), "step_00000010", "step_00000015 says it was"),
    "another update": (reseal_as(11), "step_00000010", "state.json is of update 11"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_names_what_is_wrong(run: Path, runs: dict[str, Path], damage: str) -> None:
    """A user would move or branch from a checkpoint that is damaged, or is not of this run."""
    harm, where, words = DAMAGES[damage]
    harm(run / "checkpoints/step_00000010", runs)
    code, text = call("check", run, "--json")
    faults = json.loads(text)["faults"]
    assert code == 1
    assert any(words in fault["what"] and fault["checkpoint"] == where for fault in faults)
    assert {fault["checkpoint"] for fault in faults} <= {where, "step_00000005"}  # the one before may be the odd one
    code, text = call("check", run)
    assert code == 1
    assert words in text


def test_every_damaged_file_is_named(run: Path) -> None:
    """A user would mend one file, and find the next one broken."""
    flip(run / f"checkpoints/step_00000005/{RANK_0}")
    flip(run / f"checkpoints/step_00000015/{RANK_0}")
    (run / "checkpoints/step_00000015/state.json").write_text("{")
    faults = json.loads(call("check", run, "--json")[1])["faults"]
    assert [(fault["checkpoint"], fault["what"].split()[0]) for fault in faults] == [
        ("step_00000015", RANK_0),
        ("step_00000015", "state.json"),
        ("step_00000005", RANK_0),
    ]


def test_diff_tells_values_by_name_and_tensors_by_size(
    run: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints that should be the same, and are not, could not be told apart."""
    monkeypatch.setattr(inspect, "PIECE", 1000)
    checkpoint = run / "checkpoints/step_00000010"
    assert call("diff", f"{run}@10", checkpoint) == (0, "0 values and 0 tensors differ\n")
    tensors = load_file(checkpoint / RANK_0)
    name = "exp_avg/blocks.1.feed_forward.w2.weight/0"
    key = name if name in tensors else next(key for key in sorted(tensors) if key.startswith("exp_avg/blocks.1"))
    tensors[key][-1] += 0.25
    tensors[key][7] -= 0.5
    save_file(tensors, checkpoint / RANK_0)
    seal(checkpoint)
    code, text = call("diff", f"{runs['own']}@10", checkpoint, "--json")
    (found,) = json.loads(text)["tensors"]
    assert code == 1
    assert (found["name"], found["kind"], found["elements"]) == (key.split("/")[1], "exp_avg", 2)
    assert found["largest"] == pytest.approx(0.5, rel=1e-3)
    assert [row["name"] for row in json.loads(text)["state"]] == ["rank 0, rng"]

    code, text = call("diff", f"{runs['own']}@10", f"{runs['seed']}@10")
    assert code == 1
    assert "trajectory.seed: 7 | 8" in text
    assert "embed.weight" in text
    with pytest.raises(CheckpointError, match="write RUN@STEP"):
        call("diff", runs["own"], checkpoint)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_converted_checkpoint_is_the_same_and_trains_on(
    prepared: dict[str, Any], runs: dict[str, Path], tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was moved would be another run from there on."""
    monkeypatch.setattr(convert, "PIECE", 1000)
    moved = tmp_path / "moved"
    code, text = call("convert", f"{runs['own']}@10", moved, "--ranks", ranks)
    there = moved / "step_00000010"
    assert (code, f"--resume {there}" in text) == (0, True)
    assert sorted(path.name for path in there.glob("rank_*")) == [
        f"rank_{rank:05d}.safetensors" for rank in range(ranks)
    ]
    assert (moved / "latest").read_text() == "step_00000010\n"
    assert sorted(path.name for path in moved.iterdir()) == ["latest", "step_00000010"]
    assert call("diff", f"{runs['own']}@10", there)[0] == 0
    sizes = [path.stat().st_size for path in there.glob("rank_*")]
    assert max(sizes) < 1.1 * min(sizes)
    with pytest.raises(CheckpointError, match="is there already"):
        call("convert", f"{runs['own']}@10", moved)

    train_here(prepared, tmp_path / "on", *WORDS, resume=str(there))
    assert history(tmp_path / "on") == history(runs["own"])[10:]
    assert weights(tmp_path / "on") == weights(runs["own"])


def test_a_damaged_checkpoint_is_not_converted(run: Path, tmp_path: Path) -> None:
    """The copy would have a right manifest over wrong numbers, and nothing would ever tell."""
    flip(run / f"checkpoints/step_00000010/{RANK_0}")
    with pytest.raises(CheckpointError, match="is not what was written"):
        call("convert", f"{run}@10", tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def test_a_conversion_that_fails_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a checkpoint would lie there under a name that looks whole."""
    real = FlatReader.read
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(CheckpointError, match="make room"):
        call("convert", f"{runs['own']}@10", tmp_path / "moved")
    monkeypatch.undo()

    def full(reader: FlatReader, name: str, kind: str, start: int, stop: int) -> Any:
        if name == "norm.weight":
            raise OSError(28, "No space left on device")
        return real(reader, name, kind, start, stop)

    monkeypatch.setattr(FlatReader, "read", full)
    with pytest.raises(CheckpointError, match="No space left"):
        call("convert", f"{runs['own']}@10", tmp_path / "moved")
    assert list((tmp_path / "moved").iterdir()) == []


def test_checkpoints_behind_a_url_are_served_alike(run: Path, elsewhere: str) -> None:
    """A run whose checkpoints lie in an object store could not be looked at, checked or moved back."""
    assert call("convert", f"{run}@10", elsewhere, "--ranks", 2)[0] == 0
    assert call("convert", f"{run}@20", elsewhere, "--ranks", 2)[0] == 0
    text = (run / "config.yaml").read_text()
    config = yaml.safe_load(text)
    config["checkpoint"]["dir"] = elsewhere
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = json.loads(call("list", run, "--json")[1])
    assert [(row["step"], row["state"], row["tokens"]) for row in rows] == [
        (20, "published", 5120),
        (10, "published", 2560),
    ]
    assert all(row["saved"] for row in rows)
    assert call("check", run)[0] == 0
    assert call("diff", f"{run}@10", run / "checkpoints/step_00000010")[0] == 0
    store = fsspec.filesystem("memory")
    whole = store.cat("/moved/step_00000020/rank_00001.safetensors")
    store.pipe("/moved/step_00000020/rank_00001.safetensors", np.frombuffer(whole, np.uint8)[:-1].tobytes())
    store.mv("/moved/step_00000010/manifest.json", "/moved/step_00000010/manifest.json.superseded")
    code, text = call("check", run)
    assert (code, "step_00000020: rank_00001.safetensors has" in text) == (1, True)
    rows = json.loads(call("list", run, "--json")[1])
    assert [(row["step"], row["state"]) for row in rows] == [(20, "published"), (10, "superseded")]
