"""A job in which one rank hangs or dies ends by itself, in time, and says which rank it was."""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import Config
from llmtrain.config_file import load_config, validate
from llmtrain.distributed import World
from llmtrain.engines.base import Engine
from llmtrain.errors import DataError, LlmtrainError
from llmtrain.train import average, watchdog
from llmtrain.train.failures import Heartbeat, compose, judge, read_report, told
from llmtrain.train.limits import Limits
from llmtrain.train.watchdog import attempt_name
from llmtrain.trajectory import trajectory_of
from tests import ranks

TIMEOUT_S = 4
DEATH_S = 10
ENDS_WITHIN_S = 90  # far more than the timeout: the machine is busy


def disturb(how: str) -> None:
    """What happens to the rank under test, at the beginning of an update."""
    if how in ("hold the GIL", "die", "freeze"):
        time.sleep(1)  # for a heartbeat from this update
    if how == "sleep":
        time.sleep(3600)
    elif how == "hold the GIL":
        ctypes.PyDLL(None).sleep(3600)
    elif how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "lose the file system":
        watchdog.write_heartbeat = lambda *_: None
        time.sleep(1.5 * DEATH_S)
    elif how == "raise":
        raise ValueError("a mistake of one rank")
    elif how == "bad data":
        raise DataError("a damaged file on one node")
    elif how == "save slowly":
        save = CheckpointStore.save
        CheckpointStore.save = lambda *given, **named: time.sleep(4) or save(*given, **named)  # type: ignore
    elif how == "be suspended":
        with subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"]):
            os.kill(os.getpid(), signal.SIGSTOP)


def disturbed(path: str, rank: int, update: int, how: str) -> None:
    """Train, with one rank that does not get beyond an update; ends as the command does."""
    from llmtrain.train.run import train

    def build(config: Config, world: World) -> Engine:
        if how == "start slowly":
            time.sleep(4)
        engine = average.build(config, world)
        train_step, count = engine.train_step, itertools.count(1)

        def step(*arguments: Any) -> Any:
            if next(count) == update and world.rank == rank:
                disturb(how)
            return train_step(*arguments)

        engine.train_step = step  # type: ignore[method-assign]
        return engine

    os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"
    try:
        train(load_config(Path(path)), prepare_command="", build=build)
    except LlmtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@pytest.fixture
def attempt(prepared: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[list[int], Path, str]]:
    """Train on so many ranks until the job ends by itself; its exit codes, run folder and output."""

    def run(
        count: int, rank: int, update: int, how: str, checkpoint: dict[str, Any] | None = None, **engine: Any
    ) -> tuple[list[int], Path, str]:
        config = {**prepared, "run": {**prepared["run"], "dir": str(tmp_path / "run")}, "checkpoint": checkpoint or {}}
        config["engine"] = {**prepared["engine"], "kind": "fsdp", "timeout_s": TIMEOUT_S, **engine}
        config["batch"] = {**prepared["batch"], "global_sequences": 2 * count}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        running = ranks.start(tmp_path / "logs", count, disturbed, str(path), rank, update, how)
        if how == "die":  # as launchers do
            running.processes[rank].join(ENDS_WITHIN_S)
            for process in running.processes:
                process.terminate()
        if how == "freeze":  # it cannot end itself
            for other in {*range(count)} - {rank}:
                running.processes[other].join(ENDS_WITHIN_S)
            running.processes[rank].kill()
        return running.wait(ENDS_WITHIN_S), tmp_path / "run", running.text()

    return run


def report_of(run: Path, attempt: str = "1") -> dict[str, Any]:
    report = read_report(run / "failures" / attempt)
    assert report is not None
    return report


@pytest.mark.parametrize(("count", "how"), [(2, "sleep"), (3, "sleep"), (2, "hold the GIL")])
def test_a_hung_rank_ends_the_job_and_is_named(attempt: Callable[..., Any], count: int, how: str) -> None:
    """An allocation would burn until somebody looks, and nobody would know which node to leave out."""
    kind = "fsdp" if count == 3 else "deepspeed"
    codes, run, said = attempt(count, 1, 3, how, kind=kind)
    silent = how == "hold the GIL"  # its watchdog cannot run: to the others it is a rank without a sign of life
    assert codes == [1 if silent and rank == 1 else 4 for rank in range(count)], said
    report = report_of(run)
    [culprit] = report["culprits"]
    assert (culprit["rank"], culprit["host"], culprit["kind"]) == (1, "node1", "silent" if silent else "hung")
    assert "update 3, update" in culprit["told"]
    assert report["bad_nodes"] == ["node1"]
    assert f"rank 1 on node1: {culprit['told']}" in said
    assert all(beat["update"] == 3 and beat["waits"] for beat in report["ranks"] if beat["rank"] != 1)
    if silent:
        assert ", line" in said and "in disturb" in said  # its stacks, from a thread that needs no GIL
        return
    stacks = [(run / f"failures/1/rank_{rank:05d}.txt").read_text() for rank in range(count)]
    assert ["in disturb\n" in text for text in stacks] == [rank == 1 for rank in range(count)]
    assert ("all_gather" if kind == "fsdp" else "all_reduce") in stacks[0]


@pytest.mark.parametrize("how", ["die", "raise", "bad data"])
def test_a_rank_that_ends_alone_takes_the_others_with_it(attempt: Callable[..., Any], how: str) -> None:
    """The others would wait half an hour for a rank that was killed, and then tell that a connection was closed."""
    codes, run, said = attempt(3, 2, 3, how)
    kind, why, bad = {
        "die": ("died", "died: its last sign was in update 3, update at", []),
        "raise": ("failed", "ended in update 3, update: ValueError: a mistake of one rank", []),
        "bad data": ("failed", "ended in update 3, update: DataError: a damaged file on one node", []),
    }[how]
    assert codes[2] == {"die": -signal.SIGKILL, "raise": 1, "bad data": 2}[how], said
    assert set(codes[:2]) <= ({2, 4} if how == "bad data" else {4}), said
    report = report_of(run)
    [culprit] = report["culprits"]
    assert (culprit["rank"], culprit["kind"]) == (2, kind) and culprit["told"].startswith(why)
    assert report["bad_nodes"] == bad
    assert f"rank 2 on node2: {why}" in said
    assert len(list((run / "ranks").iterdir())) == 3  # one rank's mistake is not a start that all refuse
    if how == "die":  # the next attempt finishes, and leaves the report where it is
        codes, run, said = attempt(3, 2, 0, "nothing")
        assert codes == [0, 0, 0], said
        assert [path.name for path in (run / "failures").iterdir()] == ["1"]
        assert not (run / "ranks").exists()


@pytest.mark.parametrize("how", ["die", "freeze"])
@pytest.mark.parametrize(("count", "rank", "kind"), [(2, 1, "fsdp"), (3, 2, "deepspeed"), (3, 0, "fsdp")])
def test_a_rank_without_a_sign_is_named_while_all_others_wait_for_it(
    attempt: Callable[..., Any], count: int, rank: int, kind: str, how: str
) -> None:
    """A node that died would hold hundreds of others until `timeout_s`, half an hour, and nobody would know which."""
    codes, run, said = attempt(count, rank, 3, how, kind=kind, timeout_s=600, death_s=DEATH_S)
    assert codes == [-signal.SIGKILL if one == rank else 4 for one in range(count)], said
    report = report_of(run)
    [culprit] = report["culprits"]
    assert (culprit["rank"], culprit["host"]) == (rank, f"node{rank}")
    assert culprit["kind"] in ("died", "silent") and "in update 3, update" in culprit["told"]
    others = [beat for beat in report["ranks"] if beat["rank"] != rank]
    assert all(beat["update"] == 3 and beat["phase"] == "update" for beat in others)
    if how == "freeze":  # nothing broke: they were found waiting in the engine's own collectives
        assert culprit["kind"] == "silent" and all(beat["waits"] for beat in others)
        assert f"rank {rank} gave no sign for 5 s (engine.death_s)" in report["reason"]
        assert report["bad_nodes"] == [f"node{rank}"]


def test_a_rank_that_lives_is_not_ended_for_its_file_system(attempt: Callable[..., Any]) -> None:
    """A disk that hangs for a minute on one node would end a job that trains well."""
    codes, run, said = attempt(3, 1, 3, "lose the file system", timeout_s=600, death_s=DEATH_S)
    assert codes == [0, 0, 0], said
    assert not (run / "failures").exists()


@pytest.mark.parametrize(
    ("how", "timeout_s", "code"),
    [("save slowly", 60, 0), ("save slowly", 1, 4), ("be suspended", 60, 0), ("start slowly", 60, 0)],
)
def test_what_is_slow_for_a_reason_is_not_ended(
    attempt: Callable[..., Any], how: str, timeout_s: int, code: int
) -> None:
    """A long upload, or a job that the scheduler suspended for an hour, would be taken for a hung one."""
    codes, run, said = attempt(1, 0, 20, how, checkpoint={"timeout_s": timeout_s}, timeout_s=2)
    assert codes == [code], said
    if code:
        assert "(checkpoint.timeout_s) in update 20, save" in report_of(run)["reason"]


def beat(rank: int, **fields: Any) -> Heartbeat:
    usual = {
        "job": "a",
        "host": f"n{rank}",
        "pid": 1,
        "state": "stopped",
        "update": 7,
        "phase": "update",
        "calls": 20,
        "in_phase_s": 30.0,
        "at": "distributed.py:9 sum",
        "waits": True,
        "count": 5,
    }
    return Heartbeat(**{**usual, "rank": rank, **fields})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({1: {"waits": False}}, [(1, "hung")]),
        ({1: {"waits": False}, 2: {"calls": 21, "phase": "loop", "waits": False}}, [(1, "hung")]),
        ({2: {"state": "running"}}, [(2, "silent")]),
        ({2: None, 0: {"waits": False}}, [(2, "silent")]),
        ({3: {"state": "failed", "error": "DataError: x"}, 0: {"waits": False}}, [(3, "failed")]),
        ({2: {"calls": 19}}, [(2, "hung")]),
        ({rank: {"waits": False} for rank in range(4)}, []),
        ({0: {"at": "data/batches.py:9 fill"}}, [(0, "hung")]),
        ({}, []),
        ({0: {"at": "a"}, 1: {"at": "b"}, 2: {"at": "c"}}, []),
    ],
    ids=[
        "outside",
        "one is ahead",
        "silent",
        "no sign",
        "failed",
        "behind",
        "on GPUs",
        "elsewhere",
        "same",
        "all apart",
    ],
)
def test_the_rank_that_stands_apart_is_found(changes: dict[int, Any], found: list[tuple[int, str]]) -> None:
    """A good node would be left out, and the bad one stay in."""
    beats = [None if changes.get(rank, {}) is None else beat(rank, **changes.get(rank, {})) for rank in range(4)]
    hosts = [f"n{rank}" for rank in range(4)]
    culprits = judge(beats, beats, hosts, broke=False)
    assert [(culprit.rank, culprit.kind) for culprit in culprits] == found
    report = compose("1", "no progress", culprits, beats)
    assert report["bad_nodes"] == [f"n{rank}" for rank, kind in found if kind != "failed"]
    assert len(told(report).splitlines()) == 3 + max(1, len(found)) + 4
    died = judge(beats, beats, hosts, broke=True)
    assert [one.kind for one in died] == [{"silent": "died"}.get(kind, kind) for _, kind in found]


def test_the_pre_flight_of_a_thousand_ranks_takes_its_time(prepared: dict[str, Any]) -> None:
    """NCCL's first connections on a large fabric would take longer than they may, at every requeue again."""
    config = validate(prepared, "config")
    seconds = [Limits.of(config, size).of_phase("preflight", known=False)[0] for size in (1, 8, 1024)]
    assert seconds == [60.25, 62.0, 316.0]


@pytest.mark.parametrize(
    ("timeout_s", "death_s", "phase", "silence"),
    [
        (1800, 30, "update", (21.0, "engine.death_s")),
        (1800, 10, "validate", (5.0, "engine.death_s")),
        (4, 30, "update", (4, "engine.timeout_s")),
        (100, 30, "start", (1800, "engine.start_timeout_s")),
    ],
)
def test_a_silent_rank_is_given_time_by_what_it_does(
    prepared: dict[str, Any], timeout_s: int, death_s: int, phase: str, silence: tuple[float, str]
) -> None:
    """Loading a library from a cold disk would end the job, or the report come after `death_s`."""
    engine = {"kind": "fsdp", "timeout_s": timeout_s, "death_s": death_s}
    limits = Limits.of(validate({**prepared, "engine": engine}, "config"), 8)
    assert limits.of_silence(phase, report=9.0) == silence


def test_another_death_s_is_no_other_run(prepared: dict[str, Any]) -> None:
    """A run that was begun without the field, or with another value, could not be gone on with."""
    config, other = (validate({**prepared, "engine": {"kind": "fsdp", **more}}, "c") for more in ({}, {"death_s": 10}))
    assert (config.engine.death_s, other.engine.death_s) == (30, 10)
    assert trajectory_of(config, "data") == trajectory_of(other, "data")


def test_nccl_leaves_a_failure_to_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's own handler would abort every rank before one has written who was lost."""
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")  # what a user wants stays
    watchdog.leave_failures_to_watchdog()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")


def test_attempts_that_left_no_row_have_reports_of_their_own(tmp_path: Path) -> None:
    """The second failure would be mixed up with the first."""
    names = []
    for _ in range(3):
        name, token = attempt_name(tmp_path).split("\n")
        (tmp_path / "failures" / name).mkdir(parents=True)
        names.append((name, len(token)))
    assert names == [("1", 16), ("1.2", 16), ("1.3", 16)]
