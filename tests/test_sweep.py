"""Does a sweep come to the same end whatever happens to it on the way?

Trainings here are processes forked from one that has torch loaded, but for the one test that goes through the command.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.cli import main
from llmtrain.errors import CheckpointError
from llmtrain.study import launch
from llmtrain.study.sweep_state import hold_study
from llmtrain.train.metrics import read_metrics
from tests import ranks

REPO = Path(__file__).parent.parent
REPORTS = ("report.md", "report.html", "report.json", "report.csv")
DEADLINE_S = 120
Captured = pytest.CaptureFixture[str]


class Forked:
    """A training in a forked process, with what a sweep needs of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()


def forked(method: str) -> Callable[..., Forked]:
    """`start_training` by forking this process, or from the fork server."""
    context: Any = ranks._CONTEXT if method == "forkserver" else multiprocessing.get_context(method)

    def start(
        config: Path, threads: int, log: Path, *, gpu: str | None = None, kept_open: Sequence[int] = ()
    ) -> Forked:
        process = context.Process(target=train, args=(config, log))
        process.start()
        return Forked(process)

    return start


def train(config: Path, log: Path) -> None:
    """One training, its output in its log."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code: int | str | None = 0
    try:
        main(["train", "--config", str(config)])
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def sweep_forking(words: list[str]) -> None:
    """A whole sweep whose trainings are forked from it: one group of processes."""
    launch.start_training = forked("fork")  # type: ignore[assignment]
    main(["sweep", *words])


def write_study(folder: Path, base: dict[str, Any], grid: dict[str, Any], **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "study.yaml"
    values = {"name": "small", "base": "base.yaml", "dir": str(folder / "runs"), "set": sections, "grid": grid}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Callable[..., tuple[str, str]]:
    """Run `llmtrain sweep` in this process; its stdout and stderr."""
    monkeypatch.setattr(launch, "start_training", forked("forkserver"))
    monkeypatch.setattr("llmtrain.study.sweep._POLL_S", 0.02)

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["sweep", *map(str, words)])
        out, err = capsys.readouterr()
        assert (ended.value.code, "Traceback" in err) == (code, False), out + err
        return out, err

    return run


def updates(study: Path) -> int:
    """Rows of updates in all run folders."""
    return sum(file.read_text().count('"kind": "step"') for file in (study.parent / "runs").glob("*/metrics.jsonl"))


def wait_for(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was last written, and its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def finished(study: Path) -> dict[str, dict[str, tuple[int, bytes]]]:
    """The files of every run that reached its end."""
    ends = (study.parent / "runs").glob("*/checkpoints/step_00000020")
    return {end.parent.parent.name: contents(end.parent.parent) for end in ends}


def test_a_sweep_that_is_killed_again_and_again_ends_as_one_that_never_was(
    prepared: dict[str, Any], tmp_path: Path
) -> None:
    """A night of runs would be lost or done twice, or the report would depend on how often the machine went down."""
    grid = {"schedules": [{"name": "cosine"}, {"name": "linear"}], "seeds": [1, 2]}
    sections = {"checkpoint": {"every": "8 steps"}, "validation": {"every": "10 steps"}}
    straight = write_study(tmp_path / "straight", prepared, grid, **sections)
    killed = write_study(tmp_path / "killed", prepared, grid, **sections)
    ranks.start(tmp_path / "log", 1, sweep_forking, [str(straight), "--at-once", "2"]).succeeded()
    for attempt, rows in enumerate((3, 45, 62)):
        before = finished(killed)
        words = [str(killed), "--at-once", "2"]
        running = ranks.start(tmp_path / f"log{attempt}", 1, sweep_forking, words, grouped=True)
        wait_for(lambda rows=rows: updates(killed) >= rows, running.text)  # type: ignore[misc]
        running.kill()
        running.wait()
        wait_for(lambda: not held(killed.parent / "runs"), lambda: "a training outlived its group")
        after = finished(killed)
        assert before == {name: after[name] for name in before}
        assert len(after) < 4, running.text()
    assert before  # something was finished before the last kill, and was left alone
    last = ranks.start(tmp_path / "last", 1, sweep_forking, [str(killed)]).succeeded()
    assert "1 at once" in last.text() and "FINISHED study=small" in last.text()
    after = finished(killed)
    assert before == {name: after[name] for name in before} and len(after) == 4
    for name in REPORTS:
        found, wanted = (study.parent / "runs" / name for study in (killed, straight))
        assert found.read_bytes() == wanted.read_bytes(), name
    for name in after:
        rows = [row["attempt"] for row in read_metrics(killed.parent / "runs" / name)]
        state = "checkpoints/step_00000020/rank_00000.safetensors"
        assert after[name][state][1] == (straight.parent / "runs" / name / state).read_bytes()
        assert len([row for row in rows if row]) == 23  # 20 updates, validated before, after 10 and at the end


def held(folder: Path) -> bool:
    """Whether a sweep or one of its trainings holds the study."""
    try:
        with hold_study(folder, shared=False):
            return False
    except CheckpointError:
        return True


def test_a_sweep_that_is_told_to_stop_saves_its_runs(prepared: dict[str, Any], tmp_path: Path) -> None:
    """Ctrl-C would cost what was trained since the last checkpoint, or leave trainings behind."""
    study = write_study(tmp_path / "study", prepared, {"seeds": [1, 2, 3]}, schedule={"horizon": "3000 steps"})
    running = ranks.start(tmp_path / "log", 1, sweep_forking, [str(study), "--at-once", "2"])
    both = [study.parent / "runs" / f"cosine-w4-p0.01-s{seed}" for seed in (1, 2)]
    started = lambda: all(run.is_dir() and (run / "metrics.jsonl").exists() for run in both)  # noqa: E731
    wait_for(lambda: started() and updates(study) > 20, running.text)
    os.kill(running.processes[0].pid or 0, signal.SIGINT)
    said = running.succeeded().text()
    assert "STOPPED (signal SIGINT): 0 of 3 runs finished, 2 saved; the same command goes on from here" in said
    assert not held(study.parent / "runs") and not (study.parent / "runs" / "report.md").exists()
    for run in both:
        last = [row["step"] for row in read_metrics(run) if row["kind"] == "step"][-1]
        assert (run / f"checkpoints/step_{last:08d}/manifest.json").is_file()
        assert "STOPPED (signal SIGTERM)" in (run / "train.log").read_text()


def test_a_run_that_fails_holds_up_no_other(
    prepared: dict[str, Any], tmp_path: Path, sweep: Callable[..., tuple[str, str]]
) -> None:
    """One peak that is too high would end a study of a hundred runs, or nobody would hear why one is missing."""
    study = write_study(tmp_path / "study", prepared, {"peaks": [1e30, 0.01, 0.02]}, schedule={"horizon": "6 steps"})
    out, _ = sweep(study, "--at-once", "2", code=1)
    assert "run 1 cosine-w4-p1e30-s7: FAILED after update" in out
    assert "FAILED run 1 cosine-w4-p1e30-s7, exit code 3; its log ends:" in out
    assert "Nothing of it was saved" in out and "2 of 3 runs finished, 1 failed; the same command tries" in out
    report = json.loads((study.parent / "runs" / "report.json").read_text())
    assert {run["run"]: run["finished"] for run in report["runs"]}["cosine-w4-p0.01-s7"]
    before = contents(study.parent / "runs" / "cosine-w4-p0.02-s7")
    out, err = sweep(study, "--json", code=1)
    told = json.loads(out)
    assert [(run["state"], run["exit_code"]) for run in told["runs"]] == [
        ("failed", 3),
        ("finished", None),
        ("finished", None),
    ]
    assert "run 1 cosine-w4-p1e30-s7: training" in err and "run 2" not in err
    assert contents(study.parent / "runs" / "cosine-w4-p0.02-s7") == before
    assert json.loads((study.parent / "runs" / "report.json").read_text()) == report


def test_single_runs_of_a_study_are_elements_of_an_array(
    prepared: dict[str, Any], tmp_path: Path, sweep: Callable[..., tuple[str, str]], capsys: Captured
) -> None:
    """A cluster could not share a study out among its nodes, or a changed study would mix two kinds of runs."""
    grid = {"schedules": [{"name": "cosine"}, {"name": "linear"}]}
    study = write_study(tmp_path / "study", prepared, grid, schedule={"horizon": "6 steps"})
    listed = json.loads(sweep(study, "--dry-run", "--json")[0])
    assert listed["count"] == 2 and [run["index"] for run in listed["runs"]] == [1, 2]
    assert {run["state"] for run in listed["runs"]} == {"new"} and not (study.parent / "runs").exists()
    out, _ = sweep(study, "--only", 2)
    assert "FINISHED study=small" not in out and "run 2 linear-w4-p0.01-s7: finished, validation loss" in out
    assert [path.parent.name for path in study.parent.glob("runs/*/metrics.jsonl")] == ["linear-w4-p0.01-s7"]
    assert not (study.parent / "runs" / "report.md").exists()
    assert "the runs of" in sweep(study, "--only", 3, code=2)[1]
    with hold_study(study.parent / "runs", shared=True):  # another element
        sweep(study, "--only", 1)
        assert "is being swept: another" in sweep(study, code=2)[1]
    assert (study.parent / "runs" / "report.md").is_file()  # the last one reports
    with pytest.raises(SystemExit):
        main(["compare", str(study), "--json"])
    assert sorted(run["schedule"] for run in json.loads(capsys.readouterr().out)["runs"]) == ["cosine", "linear"]
    _, err = sweep(study, "--set", "set.schedule.floor=0.2", code=2)
    assert f"the study contradicts runs that are in {study.parent / 'runs'}" in err
    assert "cosine-w4-p0.01-s7: schedule.floor was 0.1, is 0.2" in err
    assert "state" in sweep(study, "--dry-run")[0] and "2 finished, 0 begun" in sweep(study)[0]


def test_the_shipped_ablation_in_short(
    prepared: dict[str, Any], tmp_path: Path, sweep: Callable[..., tuple[str, str]]
) -> None:
    """The study that a newcomer starts with would not give its table and its page."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(prepared))
    words = [f"base={tmp_path / 'base.yaml'}", f"dir={tmp_path / 'ablation'}", "baseline=cosine-w2"]
    words += ["grid.seeds=[1]", "grid.warmups=['2 steps', '0 steps']"]
    words += ["set.schedule.horizon=8 steps", "set.schedule.warmup=2 steps"]
    overrides = [part for word in words for part in ("--set", word)]
    out, _ = sweep(REPO / "configs/studies/ablation.yaml", *overrides)
    cells = [f"{shape} warmup={warmup} steps" for shape in ("cosine", "linear", "step") for warmup in (2, 0)]
    for cell in cells:
        assert cell in out
    report = json.loads((tmp_path / "ablation" / "report.json").read_text())
    assert sorted(row["schedule"] for row in report["schedules"]) == sorted(cells)
    assert report["ranked"] and report["baseline"] == "cosine warmup=2 steps" and len(report["runs"]) == 6
    assert all(row["area"] > 0 for row in report["schedules"])
    page = (tmp_path / "ablation" / "report.html").read_text()
    assert all(cell in page for cell in cells) and "there the area decides" in page


def test_the_command_itself_survives_the_loss_of_its_sweep(
    prepared: dict[str, Any], tmp_path: Path, sweep: Callable[..., tuple[str, str]]
) -> None:
    """Trainings whose sweep was killed would be trained a second time beside themselves."""
    study = write_study(tmp_path / "study", prepared, {})
    said, log = tmp_path / "said", study.parent / "runs" / "cosine-w4-p0.01-s7" / "train.log"
    with said.open("w") as out:
        command = [sys.executable, "-m", "llmtrain", "sweep", str(study)]
        first = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            wait_for(lambda: updates(study) >= 2 or first.poll() is not None, said.read_text)
            assert first.poll() is None, said.read_text()
            os.killpg(first.pid, signal.SIGSTOP)  # the training lives, and gets no further
            first.kill()
            first.wait()
            assert "or a training that one started" in sweep(study, code=2)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGTERM)
                os.killpg(first.pid, signal.SIGCONT)
    wait_for(lambda: not held(study.parent / "runs"), log.read_text)
    assert "STOPPED (signal SIGTERM)" in log.read_text()
    assert "FINISHED study=small" in sweep(study)[0]
    assert log.read_text().count("RESUMED run=") == 1
    assert (study.parent / "runs" / "report.html").is_file()
