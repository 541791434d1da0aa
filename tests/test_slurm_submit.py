"""`llmtrain slurm` on the login node: what is submitted, what is refused, what a run's record says."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.cli import main
from llmtrain.config_file import load_config
from llmtrain.errors import ConfigError, LlmtrainError
from llmtrain.slurm.again import decide, leave_out
from llmtrain.slurm.cluster_file import read_cluster, seconds_of
from llmtrain.slurm.script import plain_script
from llmtrain.slurm.status import status_of
from llmtrain.train import attempts
from llmtrain.train.attempts import lead_s, note, seconds_left
from llmtrain.train.stop import StopRequest
from tests.test_stop import ALONE

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/slurm"
SITES = ("plain", "site", "container")


@pytest.fixture
def here(prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**prepared, "batch": {**prepared["batch"], "micro": 1}}))
    return tmp_path


def llmtrain(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def submitted(*words: str) -> tuple[str, ...]:
    return ("slurm", "submit", "--config", "small.yaml", "--set", "batch.global_sequences=64", *words)


@pytest.mark.parametrize("site", SITES)
def test_submit_writes_the_script_of_the_cluster(site: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job would be submitted with other options, modules or mounts than the cluster needs."""
    assert llmtrain(*submitted("--cluster", str(GOLDEN / f"{site}.yaml"), "--nodes", "2", "--dry-run")) == 0
    assert capsys.readouterr().out == (GOLDEN / f"{site}.sbatch").read_text()
    assert not (here / "runs").exists()


def test_the_plain_script_is_the_one_that_is_shown() -> None:
    """A user who copies launch/slurm/pretrain.sbatch would miss what was mended in the one that is submitted."""
    assert (ROOT / "launch/slurm/pretrain.sbatch").read_text() == plain_script()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_every_script_passes_shellcheck() -> None:
    """A script would break on a path with a space, or go on after a failure."""
    scripts = [*(ROOT / "launch/slurm").iterdir(), *GOLDEN.glob("*.sbatch"), ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", "--exclude=SC1091", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_submit_gives_the_job_its_own_code_and_config(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An edit while the job waits in the queue would change what it trains."""
    bin_dir = here / "bin"
    bin_dir.mkdir()
    (bin_dir / "sbatch").write_text('#!/bin/sh\ncp "$2" seen.sbatch\necho 4711\n')
    (bin_dir / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    words = submitted("--set", "run.seed=8", "--gpus-per-node", "2", "--nodes", "1-2", "--time", "20:00")
    assert llmtrain(*words) == 0
    said = capsys.readouterr().out
    assert "job 4711: 2 to 4 ranks, 20:00 a start, told to save 300 s before its end (until it was measured)" in said
    folder = here / "runs/small/submitted/0001"
    assert load_config(folder / "config.yaml").run.seed == 8
    assert (folder / "code/llmtrain/train/loop.py").read_bytes() == (ROOT / "llmtrain/train/loop.py").read_bytes()
    assert json.loads((folder / "submission.json").read_text())["job"] == "4711"
    script = (here / "seen.sbatch").read_text()
    assert "#SBATCH --nodes=1-2\n" in script and "\nfewest=1 " in script
    assert "llmtrain=(python runs/small/submitted/0001/code)" in script
    (folder / "code/llmtrain/cli.py").write_text("def main(): print(__file__)")
    used = subprocess.run([sys.executable, folder / "code"], capture_output=True, text=True, check=True).stdout
    assert used == f"{folder / 'code/llmtrain/cli.py'}\n"
    assert llmtrain(*words) == 0
    assert (here / "runs/small/submitted/0002/config.yaml").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--set", "batch.mcro=1"), 'unknown key "batch.mcro"; did you mean "micro"?'),
        (("--set", "data.path=nowhere"), "llmtrain prepare --config small.yaml --set data.path=nowhere"),
        (("--set", "schedule.name=cosin"), "cosine"),
        (("--nodes", "9"), "64 sequences do not divide into micro-batches of 1 on 9 ranks"),
        (("--nodes", "2-3"), "on 3 ranks"),
        (("--nodes", "3-2"), '--nodes "3-2": write a number, or the fewest and the most'),
        (("--time", "soon"), '"soon" is not a time that sbatch reads'),
        (("--set", "model.ffn_size=1000000000000"), "GiB free"),
        (("--cluster", "none.yaml"), "cannot read cluster file none.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_submit_refuses_before_the_queue(
    words: tuple[str, ...], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job would wait a night in the queue to fail in its first second."""
    assert llmtrain(*submitted("--gpus-per-node", "0", *words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partitin: gpu", 'unknown key "partitin"; did you mean "partition"?'),
        ("container: {imag: x}", 'unknown key "container.imag"; did you mean "image"?'),
        ("time: tomorrow", '"tomorrow" is not a time'),
        ("environment: {A-B: c}", '"A-B" is not a name'),
        ("options: {signal: USR1@10}", '"signal" is set by llmtrain slurm submit'),
        ("gpus_per_node: many", "gpus_per_node"),
        ("- list", "must be a mapping"),
    ],
)
def test_a_cluster_file_is_strict(text: str, told: str, tmp_path: Path) -> None:
    """A misspelt partition or limit would be ignored, and the job would wait in the wrong queue."""
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_cluster(path)
    assert told in str(refused.value)


def test_the_example_of_the_docs_is_a_cluster_file(tmp_path: Path) -> None:
    """A user who starts from the documented file would be refused."""
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/slurm.md").read_text(), re.DOTALL)
    path = tmp_path / "cluster.yaml"
    path.write_text(example)
    assert read_cluster(path).container.mounts == ["/data:/data"]


def test_times_are_read_as_sbatch_reads_them() -> None:
    """The lead would be compared with another limit than the job has."""
    known = {"30": 1800, "1:30": 90, "2:00:00": 7200, "1-12": 129600, "1-12:30": 131400, "1-00:00:05": 86405}
    assert {text: seconds_of(text) for text in known} == known


def ended(run: Path, **facts: Any) -> None:
    note(run, "ended", **{"attempt": 1, "outcome": "stopped", "reason": "signal SIGUSR1", **facts})


def started(run: Path, update: int = 0, attempt: int = 1) -> None:
    note(run, "started", attempt=attempt, update=update, ranks=2, hosts=["a", "b"])


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


@pytest.mark.usefixtures("job")
def test_a_job_starts_again_only_where_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished or mistaken run would take its turn in the queue for ever, or a stopped one would never come back."""
    run = tmp_path / "run"
    assert decide(run, "7", 0, 1, 20).why == "it ended before its first update: see the messages above"
    started(run)
    assert decide(run, "7", 0, 137, 20) == (True, "ended with exit code 137", [])
    assert decide(run, "7", 0, 2, 20).again is False
    assert decide(run, "7", 0, 3, 20).again is False
    assert decide(run, "8", 0, 137, 20).again is False
    ended(run)
    assert decide(run, "7", 0, 143, 20) == (True, "stopped by signal SIGUSR1", [])
    assert decide(run, "7", 19, 143, 20).why == "all 20 attempts are used up"
    ended(run, outcome="failed", reason="the loss is not finite", exit_code=3)
    assert decide(run, "7", 0, 143, 20).again is False
    for restart in (1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        started(run)
    assert decide(run, "7", 2, 1, 20).why == "3 starts in a row ended before they saved anything after update 0"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    started(run, update=5, attempt=2)
    report = run / "failures/2.2/report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"attempt": "2.2", "bad_nodes": ["n3", "n1"]}))
    two_spare = "needs 2\nn0 mix\nn1 mix\nn2 idle\nn3 alloc\n"
    assert decide(run, "7", 3, 4, 20, lambda: two_spare) == (True, "ended with exit code 4", ["n1", "n3"])
    ended(run, reason="the file run/stop exists")
    assert decide(run, "7", 3, 0, 20).why == "it was asked to stop: the file run/stop exists"
    ended(run, outcome="finished", reason="")
    assert decide(run, "7", 3, 0, 20).why == "the run is finished"


NO_SPARE = "n1 is not left out: the partition has no spare node (2 needed, 1 besides it)"
NO_NUMBER = 'n1 is not left out: the batch script does not say how many nodes the job needs: fewest="{}"'


@pytest.mark.parametrize(
    ("slurm_says", "without", "kept"),
    [
        ("needs 2\nn0 mix\nn1 mix", [], [NO_SPARE]),
        ("needs 1\nn0 mix\nn1 mix", ["n1"], []),
        ("needs 2\nn0 alloc-\nn1 comp\nn2 idle~", ["n1"], []),
        ("needs 2\nn0 mix\nn1 drain*\nn2 plnd", ["n1"], []),
        ("needs 2\nn0 mix\nn1 mix\nn2 idle*\nn3 down\nn4 drng\nn5 idle$\nn6 maint", [], [NO_SPARE]),
        ("needs 2\nn0 mix\nn1 mix\nn2 idle\nn2 excluded\nn9 excluded", [], [NO_SPARE]),
        ("needs 2\nn0 mix\nn1 mix\nn2 idle\nn3 idle\nn3 excluded", ["n1", "n3"], []),
        ("needs 1\nn0 idle\nn1 mix\nn1 required", [], ["n1 is not left out: the job asks for it by name"]),
        ("needs 2", [], [NO_SPARE.replace("1 besides", "0 besides")]),
        ("needs 1-2\nn0 idle\nn1 mix\nn2 idle", [], [NO_NUMBER.format("1-2")]),
        ("", [], [NO_NUMBER.format("")]),
    ],
    ids=[
        "none to spare",
        "fewer will do",
        "a third",
        "drained itself",
        "others do not work",
        "left out before",
        "one more is left out",
        "by name",
        "no answer",
        "no number",
        "an old script",
    ],
)
def test_only_a_node_that_can_be_spared_is_left_out(slurm_says: str, without: list[str], kept: list[str]) -> None:
    """A job would wait for ever for the node it excludes, or a node excluded before come back."""
    assert leave_out(["n1"], slurm_says) == (without, kept)


def test_of_two_bad_nodes_the_one_that_can_be_spared_is_left_out() -> None:
    """Each would be found to be spare by itself, and the job wait for both."""
    without, kept = leave_out(["n1", "n2"], "needs 2\nn0 mix\nn1 mix\nn2 mix")
    assert (without, kept) == (["n1"], [NO_SPARE.replace("n1", "n2")])


@pytest.mark.usefixtures("job")
def test_again_answers_a_batch_script(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch script would not understand the answer, or the options of the run it passes on."""
    started(here / "runs/small")
    words = ("slurm", "again", "--config", "small.yaml", "--schedule-change", "extend", "--code", "137")
    assert llmtrain(*words) == 0
    assert capsys.readouterr() == ("again\n", "job 7: started again: ended with exit code 137\n")
    report = here / "runs/small/failures/1/report.json"
    report.parent.mkdir(parents=True)
    report.write_text('{"bad_nodes": ["n1"]}')
    for slurm_says, answer, told in (
        ("needs 2\nn0 mix\nn1 mix\nn2 idle\nn9 excluded", "again n1,n9\n", ""),
        ("needs 2\nn0 mix\nn1 mix", "again\n", f"; {NO_SPARE}"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(slurm_says))
        assert llmtrain(*words) == 0
        assert capsys.readouterr() == (answer, f"job 7: started again: ended with exit code 137{told}\n")
    assert llmtrain(*words, "--resume", "runs/small@5") == 0
    assert capsys.readouterr().out == "end\n"
    assert llmtrain(*words, "--set", "run.nam=x") == 0
    assert capsys.readouterr() == ("end\n", "job 7: ends here: the config is refused: see the message above\n")


@pytest.mark.usefixtures("job")
def test_a_job_is_told_of_its_end_as_early_as_saving_needs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large run would be killed in the middle of its last save, at every time limit."""
    run = here / "runs/small"
    assert lead_s(run) is None and seconds_left(run, {"SLURM_JOB_END_TIME": str(int(time.time()) + 1000)}) is None
    for slowest_s, save_s in ((300.0, 100.0), (250.0, 50.0)):
        ended(run, slowest_s=slowest_s, save_s=save_s)
    assert lead_s(run) == 2 * 400 + attempts.SPARE_S
    assert llmtrain(*submitted("--gpus-per-node", "0", "--time", "2:00:00", "--dry-run")) == 0
    assert "#SBATCH --signal=USR1@830\n" in capsys.readouterr().out
    assert llmtrain(*submitted("--gpus-per-node", "0", "--time", "20:00")) == 2
    assert "the job must be told 830 s before its end; ask for at least 28 minutes" in capsys.readouterr().err
    now = 1_000_000.0
    monkeypatch.setattr(attempts.time, "time", lambda: now)
    assert seconds_left(run, {"SLURM_JOB_END_TIME": "1002000"}) == 2000 - 830
    assert seconds_left(run, {"SLURM_JOB_END_TIME": "999999"}) is None
    assert seconds_left(run, {"SLURM_JOB_END_TIME": ""}) is None
    assert StopRequest(run, None, job_left_s=-1.0).agreed(ALONE) == "the job's time limit is near"
    assert StopRequest(run, None, job_left_s=1000.0).agreed(ALONE) == ""


@pytest.mark.usefixtures("job")
def test_a_failure_is_on_record_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun would answer with the exit code of the ranks it ended, and the mistake would be started again."""
    for step, rank, told in (("0", "1", "error: no data\n"), ("0", "0", ""), ("1", "0", "error: no data\n")):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        monkeypatch.setenv("SLURM_PROCID", rank)
        with pytest.raises(SystemExit) as ended, attempts.recorded(tmp_path / "run"):
            raise LlmtrainError("no data")
        assert ended.value.code == 2
        assert capsys.readouterr().err == told
    assert decide(tmp_path / "run", "7", 0, 143, 20).why.startswith("a mistake")
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(LlmtrainError), attempts.recorded(tmp_path / "other"):
        raise LlmtrainError("no data")
    assert not (tmp_path / "other").exists()


def step(update: int, attempt: int) -> str:
    row = {"kind": "step", "step": update, "loss": 3.0, "step_time_s": 2.0, "attempt": attempt}
    return json.dumps(row) + "\n"


@pytest.mark.usefixtures("job")
def test_status_counts_attempts_lost_work_and_the_time_left(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user would not see that a run loses most of its work, or when it will be finished."""
    run = here / "runs/small"
    started(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    started(run, update=5, attempt=2)
    ended(run, attempt=2, update=8)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    started(run, update=8, attempt=3)
    shutil.copy(here / "small.yaml", run / "config.yaml")
    (run / "metrics.jsonl").write_text("".join(step(k, 1 if k <= 5 else 2 if k <= 8 else 3) for k in range(1, 11)))
    (run / "metrics.superseded.jsonl").write_text(step(6, 1) + step(7, 1))
    found = status_of(run)
    assert [(a.number, a.first, a.last, a.lost, a.outcome) for a in found.attempts] == [
        (1, 0, 7, 2, "open"),
        (2, 5, 8, 0, "stopped"),
        (3, 8, 10, 0, "open"),
    ]
    assert (found.update, found.updates, found.remaining_s) == (10, 20, 20.0)
    assert llmtrain("slurm", "status", "runs/small") == 0
    said = capsys.readouterr().out
    assert "stopped signal SIGUSR1" in said
    assert "small: update 10 of 20  loss 3.0000  2.00 s an update, 0:00 h of training left" in said
    assert llmtrain("slurm", "status", "runs/small", "--json") == 0
    assert json.loads(capsys.readouterr().out)["attempts"][0]["lost"] == 2
    assert llmtrain("slurm", "status", "nothing") == 2
    assert "nothing is not a run folder" in capsys.readouterr().err
