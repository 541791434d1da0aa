"""A run end to end: validation disturbs nothing, nothing bad is saved, no network is needed."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmtrain.checkpoint.store import fingerprint
from llmtrain.cli import main
from llmtrain.config_file import load_config
from llmtrain.data.dataset import open_data
from llmtrain.errors import CheckpointError, DataError, DivergenceError
from llmtrain.train.attempts import read_attempts
from llmtrain.train.metrics import DOCUMENTS_FILE, read_metrics
from llmtrain.train.saved import evaluate_run
from tests import ranks
from tests.conftest import text_folder
from tests.test_resume import ENGINES, history, weights

Leg = Callable[..., ranks.Ranks]


def train_here(prepared: dict[str, Any], run: Path, *overrides: str, resume: Any = "auto") -> None:
    """One leg on one device, in this process."""
    from llmtrain.train.run import train

    path = run.with_name(run.name + ".yaml")
    path.write_text(yaml.safe_dump(prepared))
    train(load_config(path, [f"run.dir={run}", *overrides]), prepare_command="llmtrain prepare", resume=resume)


def command(prepared: dict[str, Any], run: Path, *overrides: str, resume: str = "auto") -> list[str]:
    """The words of one leg, for functions that ranks run."""
    path = run.with_name(run.name + ".yaml")
    path.write_text(yaml.safe_dump(prepared))
    words = ["train", "--config", str(path), "--resume", resume]
    for override in (f"run.dir={run}", *overrides):
        words += ["--set", override]
    return words


def seal(checkpoint: Path) -> None:
    """Let the manifest agree with files that a test changed."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"]
    entries = [fingerprint(path) for path in files]
    (checkpoint / "manifest.json").write_text(json.dumps({"files": entries, "ephemeral": False}))


def validations(run: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["set"]) for row in read_metrics(run) if row["kind"] == "validation"]


@pytest.mark.parametrize(("engine", "count"), [("single", 1), ("fsdp", 2), ("zero3", 2)])
def test_validation_does_not_disturb_training(leg: Leg, tmp_path: Path, engine: str, count: int) -> None:
    """How often a user looks would decide which model comes out."""
    runs = {every: tmp_path / str(every) for every in ("never", 1, 7)}
    for every, run in runs.items():
        override = "null" if every == "never" else f"{every} steps"
        leg(run.name, count, *ENGINES[engine], f"validation.every={override}").succeeded()
    expected = {"never": [0, 20], 1: list(range(21)), 7: [0, 7, 14, 20]}
    for every, run in runs.items():
        assert [step for step, _ in validations(run)] == expected[every]
        assert history(run) == history(runs["never"])
        assert weights(run) == weights(runs["never"])


def other_set(prepared: dict[str, Any], folder: Path, **tokenizer: Any) -> Path:
    """Another prepared folder: eight of the documents, in this tokenizer."""
    text = text_folder(folder / "text")
    for path in sorted(text.iterdir())[8:]:
        path.unlink()
    data = {**prepared["data"], "path": str(folder / "data"), "source": {"kind": "text", "paths": [str(text)]}}
    config = {**prepared, "data": {**data, "validation_fraction": 0.5, "tokenizer": tokenizer}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--config", str(folder / "config.yaml"), "--workers", "1"])
    assert ended.value.code == 0
    return folder / "data"


def test_named_sets_are_judged_beside_the_own_one(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user could not follow two kinds of text at once; nor may a set in another tokenizer pass for comparable."""
    model = str(Path(prepared["data"]["path"]) / "tokenizer.model")
    same = other_set(prepared, tmp_path / "same", kind="model", path=model)
    train_here(prepared, tmp_path / "plain")
    train_here(
        prepared,
        tmp_path / "run",
        f"validation.sets={{code: {same}}}",
        "validation.every=10 steps",
        "validation.max_tokens=null",
    )
    sets = ("validation", "code")
    assert validations(tmp_path / "run") == [(step, name) for step in (0, 10, 20) for name in sets]
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "validation"]
    assert len({row["set_hash"] for row in rows}) == 2
    assert all(math.isclose(math.exp(row["loss"]), row["perplexity"]) for row in rows)
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")

    other = other_set(prepared, tmp_path / "other", **{**prepared["data"]["tokenizer"], "vocab_size": 340})
    with pytest.raises(DataError, match=r"validation\.sets\.code: .* another tokenizer"):
        train_here(prepared, tmp_path / "refused", f"validation.sets={{code: {other}}}")
    assert not (tmp_path / "refused").exists()


def test_the_last_validation_is_there_once_whatever_was_resumed(prepared: dict[str, Any], tmp_path: Path) -> None:
    """The number that a schedule is judged by would be missing, or stand twice."""
    run = tmp_path / "run"
    train_here(prepared, run, "checkpoint.every=8 steps")
    for name in ("step_00000020", "latest"):
        path = run / "checkpoints" / name
        path.rename(path.with_name(f"lost_{name}"))
    train_here(prepared, run, "checkpoint.every=8 steps")
    train_here(prepared, run)
    assert validations(run) == [(0, "validation"), (20, "validation")]
    steps = [(row["step"], row["attempt"]) for row in read_metrics(run) if row["kind"] == "step"]
    assert steps == [(step, 1 if step <= 16 else 2) for step in range(1, 21)]
    assert len((run / "metrics.superseded.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(leg: Leg, tmp_path: Path, engine: str) -> None:
    """A broken model would be trained on for days, and overwrite the good checkpoints."""
    run = tmp_path / "run"
    leg("run", 2, *ENGINES[engine], "run.stop_at=6 steps", "checkpoint.every=3 steps").succeeded()
    checkpoint = run / "checkpoints" / "step_00000006"
    file = checkpoint / "rank_00001.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.startswith("weight/"))
    tensors[name][0] = torch.nan
    save_file(tensors, file)
    seal(checkpoint)
    broken = leg("run", 2, *ENGINES[engine], "checkpoint.every=1 steps")
    assert broken.wait() == [DivergenceError.exit_code] * 2 == [3, 3]
    said = broken.text()
    assert "Traceback" not in said
    assert said.count("update 7: loss nan") == 1
    assert "Nothing of it was saved" in said
    assert "schedule.peak" in said
    assert sorted(path.name for path in checkpoint.parent.glob("step_*")) == ["step_00000003", "step_00000006"]
    assert len(history(run)) == 6


def test_a_damaged_checkpoint_is_not_judged(
    prepared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of results would hold a number from garbage, or one from another update than it says."""
    run = tmp_path / "run"
    train_here(prepared, run, "checkpoint.every=10 steps", "validation.every=10 steps")
    file = run / "checkpoints" / "step_00000020" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"four")
    capsys.readouterr()
    (row,) = evaluate_run(run)
    logged = next(row for row in read_metrics(run) if (row["kind"], row["step"]) == ("validation", 10))
    assert (row["step"], row["loss"]) == (10, pytest.approx(logged["loss"], rel=1e-9))
    assert f"rejected step_00000020: {file.name} is not what was written" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=f"step_00000020: {file.name} is not what was written"):
        evaluate_run(run, 20)
    with pytest.raises(CheckpointError, match=r"step_00000015: manifest\.json is missing"):
        evaluate_run(run, 15)


def without_network(words: list[str]) -> None:
    """Train where every socket but the loopback's is refused; say what was imported all the same."""
    import socket

    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            print(f"REFUSED {address}", flush=True)
            raise OSError(f"no network: {address}")
        real(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign,assignment]
    already = set(sys.modules)
    try:
        main(words)
    finally:
        imported = {name for name in sys.modules if name in ("datasets", "sentencepiece", "wandb")} - already
        print(f"IMPORTED {sorted(imported)}", flush=True)


def test_training_needs_no_network(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A compute node without internet would hang, or train on nothing."""
    words = command(prepared, tmp_path / "run", "engine.kind=fsdp")
    running = ranks.start(tmp_path / "logs", 2, without_network, words).succeeded()
    assert running.text().count("IMPORTED []") == 2
    assert "REFUSED" not in running.text()
    assert len(history(tmp_path / "run")) == 20


def test_a_run_stopped_at_its_last_update_is_validated_when_it_is_started_again(leg: Leg, tmp_path: Path) -> None:
    """A run ended by a signal just where it should end would never be compared."""
    leg("run", 1, "run.stop_at=6 steps").succeeded()
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [line for line in path.read_text().splitlines() if '"kind": "step"' in line]
    path.write_text("\n".join(rows) + "\n")
    for _ in range(2):
        leg("run", 1, "run.stop_at=6 steps", arguments=("--resume", "must")).succeeded()
        assert [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "validation"] == [6]
    starts = [row for row in read_attempts(tmp_path / "run") if row["event"] == "started"]
    assert [(row["token_files"], row["index_files"]) for row in starts] == [(4, 0), (4, 2), (4, 2)]
    assert starts[0]["index_bytes"] == 0 < starts[1]["index_bytes"] == starts[2]["index_bytes"]


def test_validation_keeps_what_each_document_cost(leg: Leg, prepared: dict[str, Any], tmp_path: Path) -> None:
    """The noise of the validation text could not be told from a difference between schedules."""
    for name, count, more in (("one", 1, ()), ("two", 2, ("engine.kind=fsdp",))):
        leg(name, count, *more, "validation.max_tokens=null", "run.stop_at=3 steps").succeeded()
    one, two = (np.load(tmp_path / name / DOCUMENTS_FILE) for name in ("one", "two"))
    row = read_metrics(tmp_path / "one")[-1]
    assert np.array_equal(one[:, 1], two[:, 1])
    assert np.allclose(one, two, rtol=1e-5)
    assert one[:, 0].sum() / row["num_tokens"] == pytest.approx(row["loss"], rel=1e-12)
    data = open_data(prepared["data"]["path"], "llmtrain prepare")
    stream = data.validation.read(0, row["num_tokens"] + 1)
    slow = np.zeros(len(one))
    for position in range(1, len(stream)):
        slow[int((stream[:position] == data.manifest.eos_id).sum())] += 1
    assert np.array_equal(one[:, 1], slow)
    assert np.count_nonzero(slow) > 1


def test_a_run_that_goes_on_with_other_kernels_says_so(
    prepared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user would look for the update from which a run is exact, or no longer is, in vain."""
    run = tmp_path / "run"
    train_here(prepared, run, "run.stop_at='2 steps'")
    assert "engine.deterministic was" not in capsys.readouterr().out
    train_here(prepared, run, "run.stop_at='4 steps'", "engine.deterministic=true", resume="must")
    assert "engine.deterministic was False until here and is True from here on" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "step"] == [1, 2, 3, 4]
