"""Two jobs cannot train the same run, and a job that is gone does not stand in the way of the next."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import CheckpointError
from llmtrain.train import lock as lock_module
from llmtrain.train.lock import RunLock
from tests import ranks
from tests.test_resume import history
from tests.test_train import train_here

Leg = Callable[..., ranks.Ranks]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.05)
    monkeypatch.setattr(lock_module, "SILENT_S", 1.0)


def write(run: Path, **changes: Any) -> None:
    """The lock of another holder."""
    run.mkdir(exist_ok=True)
    holder = {**lock_module._me(), "token": "other", "beat": 0, **changes}
    draft = run / "draft"
    draft.write_text(json.dumps(holder))
    draft.replace(run / "lock")


def test_a_second_job_is_refused_while_the_first_trains(prepared: dict[str, Any], leg: Leg, tmp_path: Path) -> None:
    """Both would write the same checkpoints and the same log, and neither could be trusted."""
    run = tmp_path / "run"
    first = leg("run", 1, "validation.every=1 steps", "schedule.horizon=2000 steps")
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(history(run)) < 3:
        assert time.monotonic() < deadline, first.text()
        time.sleep(0.01)
    second = leg("run", 2, "engine.kind=fsdp")
    assert second.wait() == [2, 2], second.text()
    holder = f"{run} is being trained by process {first.processes[0].pid} on "
    assert second.text().count(holder) == 1
    assert first.processes[0].is_alive()
    (run / "stop").touch()
    first.succeeded()
    assert not (run / "lock").exists()


def test_the_lock_of_a_killed_job_is_taken_over_at_once(
    leg: Leg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart after a crash would wait, or would have to be cleaned up by hand at night."""
    monkeypatch.setattr(lock_module, "SILENT_S", 600)
    run = tmp_path / "run"
    killed = leg("run", 1, "validation.every=1 steps", "schedule.horizon=2000 steps")
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    killed.processes[0].kill()
    killed.wait()
    lock = RunLock(run)
    lock.acquire()
    lock.release()
    write(run, started="1")  # this process has the number of one that is gone
    lock = RunLock(run)
    lock.acquire()
    lock.release()


def test_an_earlier_attempt_of_the_same_slurm_job_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job requeued to another node would refuse its own run."""
    monkeypatch.setattr(lock_module, "SILENT_S", 600)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write(tmp_path, host="another-node", restarts="0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_holder_elsewhere_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    """The clocks of two nodes, or a node that died, would decide whether a run is trained twice or never again."""
    write(tmp_path, host="another-node", job="8")
    lock = RunLock(tmp_path)
    lock.acquire()  # it was silent
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    other = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match=f"is being trained by process {os.getpid()} on "):
        other.acquire()
    lock.release()
    other.acquire()
    other.release()
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_job_that_lost_its_lock_publishes_nothing_more(tmp_path: Path) -> None:
    """A job that was suspended for a while would write over the one that was started in its place."""
    lock = RunLock(tmp_path)
    lock.acquire()
    write(tmp_path, host="another-node", pid=5)
    deadline = time.monotonic() + 60
    while not lock.problem:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "process 5 on another-node" in lock.problem
    assert "it took this one for dead" in lock.problem
    lock.release()
    assert json.loads((tmp_path / "lock").read_text())["token"] == "other"


def test_a_run_gives_its_lock_back_however_it_ends(prepared: dict[str, Any], tmp_path: Path) -> None:
    """The next start would be refused after an error."""
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="must"):
        train_here(prepared, run, resume="must")
    train_here(prepared, run, "run.stop_at=2 steps")
    assert not (run / "lock").exists()
