"""Weights & Biases mirrors the rows, and can never hurt the run."""

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main
from llmtrain.train.metrics import read_metrics
from tests import ranks
from tests.test_resume import history
from tests.test_train import command

ONLINE = "logging.wandb.mode=online"


class FakeWandb(types.ModuleType):
    """A `wandb` that writes down what it is told, and fails where it should: by an error, or by not answering."""

    class Settings(dict):  # type: ignore[type-arg]
        def __init__(self, **settings: Any) -> None:
            super().__init__(settings)

    def __init__(self, told: Path, raises: str, sleeps: str) -> None:
        super().__init__("wandb")
        self.told, self.raises, self.sleeps = told, raises, sleeps

    def tell(self, what: str, value: Any = None) -> None:
        if what == self.raises:
            raise SystemExit(f"no {what} today")
        if what == self.sleeps:
            time.sleep(3600)
        with self.told.open("a") as file:
            file.write(json.dumps([what, value]) + "\n")

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return True

    def init(self, **options: Any) -> "FakeWandb":
        self.tell("init", {**options, "settings": None})
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.tell("define_metric", [name, step_metric])

    def log(self, values: dict[str, Any]) -> None:
        self.tell("log", values)

    def finish(self) -> None:
        self.tell("finish")


def with_fake(told: Path, raises: str, sleeps: str, words: list[str]) -> None:
    """Train with a fake in the place of wandb; say in the end whether this rank has imported it."""
    from llmtrain.train import wandb_mirror

    real = wandb_mirror._start

    def start(*arguments: Any) -> Any:
        sys.modules["wandb"] = FakeWandb(told, raises, sleeps)
        return real(*arguments)

    assert "wandb" not in sys.modules
    wandb_mirror._start = start
    wandb_mirror.CLOSE_TIMEOUT_S = 0.5
    try:
        main(words)
    finally:
        print(f"IMPORTED {'wandb' in sys.modules}", flush=True)


def told(path: Path, what: str) -> list[Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [value for name, value in lines if name == what]


def test_rows_arrive_with_their_own_step_in_one_run(prepared: dict[str, Any], tmp_path: Path) -> None:
    """Rows would be dropped after a resume, every leg or rank would be a run of its own."""
    path = tmp_path / "told"
    for stop in (8, 20):
        words = command(prepared, tmp_path / "run", "engine.kind=fsdp", ONLINE, f"run.stop_at={stop} steps")
        running = ranks.start(tmp_path / f"log{stop}", 2, with_fake, path, "", "", words).succeeded()
        assert running.text().count("IMPORTED True") == running.text().count("IMPORTED False") == 1
    assert told(path, "define_metric") == [["trainer/step", None], ["*", "trainer/step"]] * 2
    rows = [row for row in told(path, "log") if "train/loss" in row]
    assert [row["trainer/step"] for row in rows] == list(range(1, 21))
    assert [row["train/loss"] for row in rows] == [json.loads(row)["loss"] for row in history(tmp_path / "run")]
    judged = [row for row in told(path, "log") if "validation/validation/loss" in row]
    assert [row["trainer/step"] for row in judged] == [0, 8, 20]
    first, second = told(path, "init")
    assert first["id"] == second["id"] == (tmp_path / "run/wandb_id").read_text().strip()
    assert (first["resume"], first["mode"], first["name"]) == ("allow", "online", "small")
    assert told(path, "finish") == [None, None]


@pytest.mark.parametrize(
    ("raises", "sleeps"), [("init", ""), ("log", ""), ("finish", ""), ("", "init"), ("", "log"), ("", "finish")]
)
def test_an_outage_never_stops_training(prepared: dict[str, Any], tmp_path: Path, raises: str, sleeps: str) -> None:
    """A service that is down would end a run of weeks, or keep its GPUs waiting."""
    words = command(prepared, tmp_path / "run", ONLINE)
    running = ranks.start(tmp_path / "logs", 1, with_fake, tmp_path / "told", raises, sleeps, words)
    assert running.wait(timeout=60) == [0], running.text()
    assert len(history(tmp_path / "run")) == 20
    assert [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "validation"] == [0, 20]
    assert "FINISHED" in running.text()
    assert (f"no {raises} today" if raises else "wandb did not finish in time") in running.text()


def test_offline_works_without_network(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A compute node without internet could not keep a run to upload later."""
    words = command(prepared, tmp_path / "run", "logging.wandb.mode=offline")
    running = ranks.start(tmp_path / "logs", 1, main, words).succeeded()
    assert "metrics.jsonl alone" not in running.text()
    assert "did not finish" not in running.text()
    (kept,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert (tmp_path / "run/wandb_id").read_text().strip() in kept.name
    assert len(history(tmp_path / "run")) == 20
