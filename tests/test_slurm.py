"""The scripts of launch/slurm on a real Slurm of two nodes: what they train, and what ends a job in its middle."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.cli import main
from llmtrain.train.attempts import read_attempts
from llmtrain.train.metrics import read_metrics
from tests import ranks
from tests.slurm_cluster import OVER, Cluster
from tests.test_resume import weights

ROOT = Path(__file__).parent.parent
CLOCK = ("step_time_s", "tokens_per_s", "mfu", "memory_gib", "attempt")  # what no two runs have alike
ZERO2 = ("engine.kind=deepspeed", "engine.zero_stage=2")
FSDP = ("engine.kind=fsdp",)
SMALL = ("--cpus-per-task=1", "--time=60")
HELD = 10  # the update after which a held job waits
PATIENCE_S = 600
Leg = Callable[..., ranks.Ranks]


class Job:
    """One run, as a job of the cluster."""

    def __init__(
        self, cluster: Cluster, folder: Path, config: dict[str, Any], name: str, *overrides: str,
        script: str = "pretrain.sbatch", held: bool = False, options: tuple[str, ...] = (), **environment: str,
    ) -> None:  # fmt: skip
        self.cluster, self.run, self.log = cluster, folder / name, folder / f"{name}.out"
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        batch = ROOT / "launch/slurm" / script
        if held:
            batch = _with_held_door(batch, folder)
            environment["HELD_AFTER"] = str(HELD)
        words: list[str] = []
        for override in (f"run.dir={self.run}", "checkpoint.every=5 steps", "engine.timeout_s=900", *overrides):
            words += ["--set", override]
        size = () if any(option.startswith("--nodes") for option in options) else ("--nodes=2", "--gpus-per-node=0")
        self.number = cluster.submit(
            *SMALL, *size, *options, f"--output={self.log}", batch, "--config", path, *words,
            **_environment(cluster), **environment,
        )  # fmt: skip

    def text(self) -> str:
        """The job's log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until_held(self) -> None:
        """Wait until the job waits in its middle."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self.run / "metrics.jsonl").exists() or updates(self.run) != list(range(1, HELD + 1)):
            state = self.cluster.show(self.number)["JobState"]
            assert time.monotonic() < deadline and state not in OVER, f"{state}\n{self.text()}"
            time.sleep(0.1)

    def started_again(self) -> None:
        """Wait until the job is back in the queue, and start it at once."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.cluster.show(self.number))["Restarts"] == "0" or found["JobState"] == "COMPLETING":
            assert time.monotonic() < deadline and found["JobState"] not in OVER, f"{found}\n{self.text()}"
            time.sleep(0.1)
        self.cluster.hurry(self.number)

    def over(self) -> dict[str, str]:
        """Wait for the end of the job, through its restarts; what `scontrol show job` says then."""
        return self.cluster.wait(self.number, timeout_s=PATIENCE_S, log=self.log)

    def finished(self, *, restarts: int) -> None:
        """Wait, and fail the test unless the job finished its run after so many restarts, and left no more to do."""
        found = self.over()
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", str(restarts)), f"{found}\n{self.text()}"
        assert self.text().count("FINISHED run=small") == 1, self.text()
        assert "ends here: the run is finished" in self.text()
        assert read_attempts(self.run)[-1]["outcome"] == "finished"


def _environment(cluster: Cluster) -> dict[str, str]:
    """What a user's shell has, from which a job is submitted."""
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    return {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _with_held_door(batch: Path, folder: Path) -> Path:
    """The same script with the door that waits."""
    text = batch.read_text()
    held = text.replace("llmtrain=(python -m llmtrain)", "llmtrain=(python tests/held_door.py)")
    held = held.replace("launch/pretrain.py", "tests/held_door.py train") if held == text else held
    assert held != text
    path = folder / f"held_{batch.name}"
    path.write_text(held)
    return path


def updates(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run) if row["kind"] == "step"]


def rows(run: Path) -> list[str]:
    """Every row as text, without what depends on the clock."""
    kept = [{key: value for key, value in row.items() if key not in CLOCK} for row in read_metrics(run)]
    return [json.dumps(row) for row in kept]


@pytest.fixture
def straight(leg: Leg, tmp_path: Path) -> Callable[..., Path]:
    """The run that nothing ends, on two ranks of one node."""

    def train(*overrides: str) -> Path:
        name = f"straight_{overrides[0].partition('=')[2]}"
        running = leg(name, 2, "checkpoint.every=5 steps", "engine.timeout_s=900", *overrides)
        assert running.wait(PATIENCE_S) == [0, 0], running.text()
        return tmp_path / name

    return train


def test_two_nodes_train_what_one_node_trains(
    cluster: Cluster, prepared: dict[str, Any], tmp_path: Path, straight: Callable[..., Path]
) -> None:
    """A user who goes to the cluster would get another model, or need other scripts for another engine."""
    jobs = {engine: Job(cluster, tmp_path, prepared, engine[0][12:], *engine) for engine in (ZERO2, FSDP)}
    for engine, job in jobs.items():
        job.finished(restarts=0)
        one_node = straight(*engine)
        assert rows(job.run) == rows(one_node)
        assert weights(job.run) == weights(one_node)
        assert read_attempts(job.run)[0]["hosts"] == ["n0", "n1"]
        assert not list(job.run.glob("rendezvous*"))


def test_what_submit_submits_trains(
    cluster: Cluster, prepared: dict[str, Any], tmp_path: Path, straight: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The script that is checked with --dry-run would not run on a cluster."""
    for name, value in {**cluster.environment, **_environment(cluster)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(prepared))
    (tmp_path / "cluster.yaml").write_text("{nodes: 2, gpus_per_node: 1, cpus_per_node: 1, time: '10:00'}")
    words = ["slurm", "submit", "--config", "config.yaml", "--cluster", "cluster.yaml"]
    for override in ("run.dir=my runs/small", "checkpoint.every=5 steps", "engine.timeout_s=900", *FSDP):
        words += ["--set", override]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    job = re.findall(r"job (\d+): 2 ranks", said.out)[0]
    run = tmp_path / "my runs/small"
    found = cluster.wait(job, timeout_s=PATIENCE_S, log=run / f"slurm-{job}.out")
    assert found["JobState"] == "COMPLETED", (run / f"slurm-{job}.out").read_text()
    one_node = straight(*FSDP)
    assert rows(run) == rows(one_node)
    assert weights(run) == weights(one_node)


def test_a_job_that_is_cut_short_finishes_by_itself(
    cluster: Cluster, prepared: dict[str, Any], tmp_path: Path, straight: Callable[..., Path]
) -> None:
    """A time limit, an administrator, a preemption or a crash would cost the run, or give another model."""
    options = {
        "limit": ("--signal=USR1@240", "--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2"),
        "torchrun": ("--signal=USR1@240", "--nodes=2", "--gpus-per-node=0"),
    }
    names = ("limit", "requeue", "preempted", "crashed", "torchrun")
    jobs = {
        name: Job(
            cluster, tmp_path, prepared, name, *FSDP, held=True, options=options.get(name, ()),
            script="torchrun.sbatch" if name == "torchrun" else "pretrain.sbatch", MASTER_ADDR="127.0.0.1",
        )
        for name in names
    }  # fmt: skip
    for name in ("limit", "torchrun"):
        jobs[name].until_held()
        _limit_to_soon(cluster, jobs[name].number)
    jobs["requeue"].until_held()
    cluster("scontrol", "requeue", jobs["requeue"].number)
    jobs["preempted"].until_held()
    cluster("scancel", "--signal=TERM", jobs["preempted"].number)
    jobs["crashed"].until_held()
    os.kill(cluster.pids(jobs["crashed"].number, "n1")[0], signal.SIGKILL)

    for job in jobs.values():
        job.started_again()
    expected = straight(*FSDP)
    for name, job in jobs.items():
        job.finished(restarts=1)
        assert rows(job.run) == rows(expected), name
        assert weights(job.run) == weights(expected), name
        starts = [row["update"] for row in read_attempts(job.run) if row["event"] == "started"]
        assert starts == [0, 5 if name == "crashed" else HELD], (name, job.text())
        assert {row["attempt"] for row in read_metrics(job.run)} == {1, 2}
        assert not (job.run / "lock").exists()
    assert "STOPPED (signal SIGUSR1)" in jobs["limit"].text()
    assert "STOPPED (signal SIGUSR1)" in jobs["torchrun"].text()
    assert "STOPPED (signal SIGTERM)" in jobs["preempted"].text()


def _limit_to_soon(cluster: Cluster, job: str) -> None:
    """Set the time limit, in whole minutes of running time, to one so near that Slurm signals when it looks next.

    It looks every 30 s. The minutes that are left then are for a busy machine.
    """
    hours, minutes, seconds = (int(part) for part in cluster.show(job)["RunTime"].split("-")[-1].split(":"))
    limit = (3600 * hours + 60 * minutes + seconds + 180) // 60 + 1
    cluster("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


def test_a_run_goes_on_with_the_node_that_is_left(
    cluster: Cluster, prepared: dict[str, Any], tmp_path: Path, straight: Callable[..., Path]
) -> None:
    """A broken node would stop a run until somebody looks, or change what it is trained on."""
    job = Job(cluster, tmp_path, prepared, "node", *FSDP, held=True, options=("--nodes=1-2", "--gpus-per-node=0"))
    job.until_held()
    cluster.kill_node("n1")
    try:
        job.finished(restarts=1)
    finally:
        cluster.revive_node("n1")
    starts = [row for row in read_attempts(job.run) if row["event"] == "started"]
    assert [(row["update"], row["ranks"], row["hosts"]) for row in starts] == [(0, 2, ["n0", "n1"]), (5, 1, ["n0"])]
    expected = [row for row in read_metrics(straight(*FSDP)) if row["kind"] == "step"]
    found = [row for row in read_metrics(job.run) if row["kind"] == "step"]
    for key in ("step", "tokens", "lr"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in expected], rtol=0, atol=1e-5)


def test_a_mistake_ends_in_one_message_and_no_other_start(
    cluster: Cluster, prepared: dict[str, Any], tmp_path: Path
) -> None:
    """A user would find the queue used up by a job that fails again and again, and pages of tracebacks."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        jobs = {
            "unreachable": (FSDP, {"MASTER_ADDR": "nowhere.invalid"}, "cannot reach rank 0 at nowhere.invalid:"),
            "busy": (FSDP, {"MASTER_PORT": port}, f"cannot listen on MASTER_PORT {port}"),
            "no_data": ((*FSDP, "data.path=/nowhere"), {}, "there is no prepared data at /nowhere"),
            "misspelt": (("engine.knd=fsdp",), {}, 'unknown key "engine.knd"; did you mean "kind"?'),
        }
        submitted = {
            name: Job(cluster, tmp_path, prepared, name, *overrides, **environment)
            for name, (overrides, environment, _) in jobs.items()
        }
        for name, job in submitted.items():
            found = job.over()
            assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), f"{found}\n{job.text()}"
            messages = re.findall(r"^error: (.*)", job.text(), re.MULTILINE)
            assert len(messages) == 1, job.text()
            assert jobs[name][2] in job.text(), job.text()
            assert "Traceback" not in job.text()


def test_a_study_is_an_array(cluster: Cluster, prepared: dict[str, Any], tmp_path: Path) -> None:
    """The runs of a comparison could not be spread over a cluster, or their results not be read together."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(prepared))
    study = {
        "name": "array",
        "base": "base.yaml",
        "dir": str(tmp_path / "array"),
        "grid": {"schedules": [{"name": "cosine"}, {"name": "linear"}], "seeds": [1, 2]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    options = ("--array=1-4", "--ntasks=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
    log = tmp_path / "sweep_%a.out"
    script = ROOT / "launch/slurm/sweep.sbatch"
    job = cluster.submit(*options, f"--output={log}", script, tmp_path / "study.yaml", **_environment(cluster))
    for index in range(1, 5):
        found = cluster.wait(f"{job}_{index}", timeout_s=PATIENCE_S)
        assert found["JobState"] == "COMPLETED", (tmp_path / f"sweep_{index}.out").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "compare", tmp_path / "array", "--json"], capture_output=True, text=True
    )
    result = json.loads(done.stdout)
    assert result["ranked"], done.stderr
    assert sorted(run["schedule"] for run in result["runs"]) == ["cosine", "cosine", "linear", "linear"]
