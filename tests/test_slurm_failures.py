"""A node that hangs, or is not like the others, on a real Slurm of two nodes."""

import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llmtrain.train.attempts import read_attempts
from llmtrain.train.failures import read_report
from llmtrain.train.metrics import read_metrics
from tests.slurm_cluster import Cluster

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 8
SMALL = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")


def submit(cluster: Cluster, config: dict[str, Any], folder: Path, nodes: str, **environment: str) -> str:
    """Submit the shipped script, with the door that fails, in `folder`; returns the job's number.

    `nodes` is a number, or MIN-MAX.
    """
    folder.mkdir(exist_ok=True)
    config = {**config, "run": {**config["run"], "dir": str(folder / "run")}, "checkpoint": {"every": "5 steps"}}
    config["engine"] = {**config["engine"], "kind": "fsdp", "timeout_s": TIMEOUT_S}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    text = (ROOT / "launch/slurm/pretrain.sbatch").read_text()
    script = folder / "pretrain.sbatch"
    for line, changed in (
        ("llmtrain=(python -m llmtrain)", "llmtrain=(python tests/failing_door.py)"),
        ('fewest="$SLURM_JOB_NUM_NODES"', f"fewest={nodes.partition('-')[0]}"),
    ):
        assert line in text
        text = text.replace(line, changed)
    script.write_text(text)
    paths = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    return cluster.submit(
        *SMALL, f"--nodes={nodes}", f"--output={folder / 'job.out'}", script, "--config", path,
        PATH=paths, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT), BAD_NODE="n1", **environment,
    )  # fmt: skip


def until(ready: Callable[[], bool], log: Path) -> None:
    """Wait until it is so; fail the test, with the job's log, where that takes minutes."""
    deadline = time.monotonic() + 200
    while not ready():
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)


def test_a_node_that_hangs_is_left_out_where_it_can_be_spared(
    cluster: Cluster, prepared: dict[str, Any], tmp_path: Path
) -> None:
    """A hung GPU would be part of every attempt, or a job that needs its node wait for ever for another one."""
    folders = {nodes: tmp_path / nodes for nodes in ("1-2", "2")}
    jobs = {nodes: submit(cluster, prepared, folder, nodes, HANGS_AFTER="7") for nodes, folder in folders.items()}
    until(lambda: cluster.show(jobs["1-2"])["ExcNodeList"] == "n1", folders["1-2"] / "job.out")
    for nodes, job in jobs.items():
        log, run = folders[nodes] / "job.out", folders[nodes] / "run"
        found = cluster.wait(job, timeout_s=300, log=log)
        said = log.read_text(errors="replace")
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), f"{found}\n{said}"
        assert found["ExcNodeList"] == ("(null)" if nodes == "2" else "n1"), said
        kept = "n1 is not left out: the partition has no spare node (2 needed, 1 besides it)"
        assert (kept in said) == (nodes == "2"), said
        report = read_report(run / "failures/1")
        assert report is not None, said
        [culprit] = report["culprits"]
        assert (culprit["rank"], culprit["host"], culprit["kind"]) == (1, "n1", "hung")
        assert "update 7" in culprit["told"] and report["bad_nodes"] == ["n1"]
        assert f"rank 1 on n1: {culprit['told']}" in said
        assert "in heard" in (run / "failures/1/rank_00001.txt").read_text()
        starts = [row for row in read_attempts(run) if row["event"] == "started"]
        second = ["n0", "n1"] if nodes == "2" else ["n0"]
        assert [(row["update"], row["hosts"]) for row in starts] == [(0, ["n0", "n1"]), (5, second)]
        assert [row["step"] for row in read_metrics(run) if row["kind"] == "step"] == list(range(1, 21))
    until(lambda: not any(cluster.pids(job, "n1") for job in jobs.values()), log)  # nothing is left running


def test_a_node_with_another_checkout_is_refused(cluster: Cluster, prepared: dict[str, Any], tmp_path: Path) -> None:
    """Half of the ranks would train with last week's code."""
    other = tmp_path / "checkout"
    shutil.copytree(ROOT / "llmtrain", other / "llmtrain", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "llmtrain/model/decoder.py").open("a") as file:
        file.write("# last week\n")
    job = submit(cluster, prepared, tmp_path, "2", OTHER_CODE=str(other))
    found = cluster.wait(job, timeout_s=200, log=tmp_path / "job.out")
    said = (tmp_path / "job.out").read_text(errors="replace")
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), f"{found}\n{said}"
    assert re.search(
        r"^  rank 1 on n1: code: llmtrain/model/decoder.py is \w{16}, on rank 0 on n0 ", said, re.MULTILINE
    )
    assert "  rank 1 on n1: config: schedule.peak is 0.02, on rank 0 on n0 0.01\n" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
