"""A run that is told to stop saves at one update on all ranks, ends well, and goes on at the next start."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.cli import main
from llmtrain.distributed import World
from llmtrain.train.metrics import read_metrics
from llmtrain.train.stop import SIGNALS, StopRequest
from tests import ranks
from tests.test_resume import history, weights
from tests.test_train import command, train_here

ALONE = World(0, 1, 0, torch.device("cpu"))


def interrupted(number: int, rank: int, update: int, words: list[str]) -> None:
    """Train; after an update one rank gets a signal, and every rank gets another in the middle of the save."""
    from llmtrain.checkpoint.store import CheckpointStore

    agreed, save = StopRequest.agreed, CheckpointStore.save
    seen = iter(range(1, 1000))

    def heard(self: StopRequest, world: World) -> str:
        if next(seen) == update and world.rank == rank:
            os.kill(os.getpid(), number)
        return agreed(self, world)

    def disturbed(self: CheckpointStore, *arguments: Any, **more: Any) -> str | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, *arguments, **more)

    StopRequest.agreed = heard  # type: ignore[method-assign]
    CheckpointStore.save = disturbed  # type: ignore[method-assign]
    main(words)


def test_a_signal_to_one_of_two_ranks_stops_both_at_one_update(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A preempted job would lose hours, hang because one rank left, or save two halves of different updates."""
    words = command(prepared, tmp_path / "run", "engine.kind=fsdp")
    at = 0
    for index, (number, rank) in enumerate([(signal.SIGINT, 0), (signal.SIGUSR1, 1), (signal.SIGTERM, 1)]):
        running = ranks.start(tmp_path / f"log{index}", 2, interrupted, number, rank, 4, words).succeeded()
        at += 4
        assert f"STOPPED (signal {signal.Signals(number).name})" in running.text()
        assert [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "step"][-1] == at
        assert len(weights(tmp_path / "run", at)) == 2
        assert (tmp_path / "run/checkpoints/latest").read_text() == f"step_{at:08d}\n"
    ranks.start(tmp_path / "last", 2, main, words).succeeded()
    straight = command(prepared, tmp_path / "straight", "engine.kind=fsdp")
    ranks.start(tmp_path / "straight_log", 2, main, straight).succeeded()
    assert history(tmp_path / "run") == history(tmp_path / "straight")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_a_stop_file_stops_once(prepared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user without the right to signal the job could not end it, or the next start would end at once too."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    train_here(prepared, run)
    assert "STOPPED (the file" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(run)] == [0, 1]
    assert (run / "checkpoints/step_00000001").is_dir()
    assert not (run / "stop").exists()
    train_here(prepared, run)
    assert len(history(run)) == 20


def test_the_wall_clock_budget_ends_the_run(
    prepared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job would be killed at its time limit, hours after its last checkpoint."""
    train_here(prepared, tmp_path / "run", "run.max_minutes=0.000001")
    assert "STOPPED (run.max_minutes is used up)" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/step_00000001").is_dir()
    assert StopRequest(tmp_path, 1.0, started=-100.0).agreed(ALONE) == "run.max_minutes is used up"


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("handlers")
def test_every_signal_is_heard_and_the_first_one_is_told(tmp_path: Path) -> None:
    """The log would not say why the run ended, or Ctrl-C would do nothing afterwards."""
    for number in SIGNALS:
        stop = StopRequest(tmp_path, None)
        with stop.listening():
            assert stop.agreed(ALONE) == ""
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.agreed(ALONE) == f"signal {number.name}"
        stop.clear()


def test_a_handler_of_a_library_does_not_end_the_run_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that handles a signal in C would turn a finished run into a failed job."""
    real: Callable[..., Any] = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with StopRequest(tmp_path, None).listening():
            pass
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            real(number, handler)
