"""A run that is told to stop saves at one update on all ranks, ends well, and goes on at the next start."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.distributed import World, open_world
from llmtrain.engines.base import Engine
from llmtrain.train import average, stop
from llmtrain.train.metrics import read_metrics
from llmtrain.train.run import train
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
    stop.POLL_S = 0.0  # the ranks agree after every update

    def heard(self: StopRequest, world: World, due: bool = False) -> str:
        if next(seen) == update and world.rank == rank:
            os.kill(os.getpid(), number)
        return agreed(self, world, due)

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


def poll(output: Path) -> None:
    """Ask after updates of 1/8 s on the first rank's clock and later 1/2 s; write after which a message was sent."""
    with open_world(60, collectives=True) as world:
        clock, polled, largest = 0.0, [], World.largest
        stop.time.monotonic = lambda: clock  # type: ignore[assignment]
        asked = StopRequest(output, None)

        def counted(self: World, *values: int) -> list[int]:
            polled.append(k)
            return largest(self, *values)

        World.largest = counted  # type: ignore[method-assign]
        for k in range(1, 101):
            clock += (0.125 if k < 50 else 0.5) * (1 + 7 * world.rank)
            if k == 90 and world.rank == 1:
                asked.reason = "a reason of rank 1"
            if reason := asked.agreed(world, due=k % 30 == 0):
                break
        (output / f"polled_{world.rank}.json").write_text(json.dumps([polled, reason]))


def test_the_ranks_ask_each_other_about_every_two_seconds(tmp_path: Path) -> None:
    """A job would be killed before it saved, ranks would wait for others that do not ask, or ask after each update."""
    ranks.start(tmp_path / "logs", 3, poll, tmp_path).succeeded()
    told = [json.loads((tmp_path / f"polled_{rank}.json").read_text()) for rank in range(3)]
    # 16 updates take 2 s until they become slower; 30, 60 and 90 are due. From 60 on it is measured that 4 do.
    assert told == [[[1, 2, 18, 30, 46, *range(60, 90, 4), 90], "a reason of rank 1"]] * 3


def listened(path: str, output: str) -> None:
    """Train, and write during which updates the ranks exchanged a control message."""
    made, heard = 0, []
    stop.POLL_S = 1e6

    def heard_of(name: str) -> None:
        method = getattr(World, name)

        def told(self: World, *arguments: Any) -> Any:
            if self.group is None and self.size > 1:  # those of a save in the background have connections of their own
                heard.append(made)
            return method(self, *arguments)

        setattr(World, name, told)

    def build(config: Config, world: World) -> Engine:
        engine = average.build(config, world)
        train_step = engine.train_step

        def step(*arguments: Any) -> Any:
            nonlocal made
            made += 1
            return train_step(*arguments)

        engine.train_step = step  # type: ignore[method-assign]
        return engine

    for name in ("sum", "largest", "gather_text", "_send", "_received"):
        heard_of(name)
    train(load_config(Path(path)), prepare_command="", build=build)
    Path(output, f"heard_{os.environ['RANK']}.json").write_text(json.dumps(sorted(set(heard))))


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_an_update_sends_no_control_message(prepared: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """A thousand ranks would wait for each other's messages after every update."""
    config = {**prepared, "run": {**prepared["run"], "dir": str(tmp_path / "run")}, "checkpoint": {"every": "6 steps"}}
    config["engine"] = {**prepared["engine"], "kind": kind}
    config["validation"] = {**prepared["validation"], "every": "8 steps"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    ranks.start(tmp_path / "logs", 2, listened, str(path), str(tmp_path)).succeeded()
    for rank in range(2):
        heard = json.loads((tmp_path / f"heard_{rank}.json").read_text())
        assert heard == [0, 1, 2, 6, 8, 12, 16, 18, 20]  # the start, two polls, then only what saves or validates


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("handlers")
def test_every_signal_is_heard_and_the_first_one_is_told(tmp_path: Path) -> None:
    """The log would not say why the run ended, or Ctrl-C would do nothing afterwards."""
    for number in SIGNALS:
        request = StopRequest(tmp_path, None)
        with request.listening():
            assert request.agreed(ALONE) == ""
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.agreed(ALONE) == f"signal {number.name}"
        request.clear()


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
