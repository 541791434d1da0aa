"""How does a run get into the queue? Checked on the login node, copied, written as a batch script, submitted.

`RUN/submitted/0001/` is what the job uses: `config.yaml` (resolved), `code/` (this package), `job.sbatch`, and
`submission.json` (who, when, which job). The checkout may change while the job waits or runs; its runs do not.
"""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import llmtrain
from llmtrain.config import Config
from llmtrain.config_file import to_yaml
from llmtrain.data.dataset import open_data
from llmtrain.errors import ConfigError, EnvironmentError
from llmtrain.model.size import parameter_count
from llmtrain.schedules import plan
from llmtrain.slurm.cluster_file import Cluster, seconds_of
from llmtrain.slurm.script import run_script
from llmtrain.train.attempts import lead_s
from llmtrain.units import show_bytes

SUBMITTED = "submitted"
BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weights and two moments


@dataclass(frozen=True)
class Submission:
    """What is to be submitted: checked, not yet written."""

    config: Config
    folder: Path
    script: str
    lead_s: int
    measured: bool  # whether the lead was measured in an earlier start of the run
    ranks: str


def prepare_submission(
    config: Config, cluster: Cluster, *, nodes: str, gpus: int, time_limit: str, prepare_command: str
) -> Submission:
    """Check everything that can be checked without a GPU. `nodes` is a number or MIN-MAX. Raises LlmtrainError."""
    counts = _node_counts(nodes)
    ranks = [count * max(1, gpus) for count in counts]
    for size in ranks:
        config.batch.accumulation(size)
    plan(config.schedule, tokens_per_update=config.batch.tokens, beta2=config.optim.betas[1])
    data = open_data(config.data.path, prepare_command)
    data.manifest.require_fits(config.model.vocab_size)
    data.num_samples(config.batch.seq_len)
    for path in config.validation.sets.values():
        open_data(path, f"llmtrain prepare --config ... --set data.path={path}")
    run_dir = Path(config.run.dir)
    _require_room(config, run_dir)
    measured = lead_s(run_dir)
    lead = _lead(measured, cluster, time_limit)
    folder = run_dir / SUBMITTED / f"{1 + len(list((run_dir / SUBMITTED).glob('[0-9]*'))):04d}"
    script = run_script(
        cluster,
        name=config.run.name,
        run_dir=run_dir,
        submitted=folder,
        nodes=nodes,
        gpus=gpus,
        time=time_limit,
        lead_s=lead,
    )
    told = f"{ranks[0]} ranks" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]} ranks"
    return Submission(config, folder, script, lead, measured is not None, told)


def submit(submission: Submission) -> str:
    """Copy code and config into the run folder, and submit. Returns the job's number. Raises EnvironmentError."""
    folder = submission.folder
    if shutil.which("sbatch") is None:
        raise EnvironmentError("sbatch is not on PATH: submit from a login node of the cluster, or look with --dry-run")
    package = Path(llmtrain.__file__).parent
    try:
        shutil.copytree(package, folder / "code/llmtrain", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(package / "__main__.py", folder / "code/__main__.py")
        (folder / "config.yaml").write_text(to_yaml(submission.config))
        script = folder / "job.sbatch"
        script.write_text(submission.script)
    except OSError as error:
        raise EnvironmentError(f"cannot write {error.filename}: {error.strerror}") from None
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentError(f"sbatch refused {script}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    facts = {"job": job, "time": time.time(), "host": os.uname().nodename, "git_commit": _git_commit(package)}
    (folder / "submission.json").write_text(json.dumps(facts) + "\n")
    return job


def _node_counts(nodes: str) -> range:
    """The numbers of nodes the job may get: `4`, or `2-4`."""
    found = re.fullmatch(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?", nodes)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise ConfigError(f'--nodes "{nodes}": write a number, or the fewest and the most, for example 2-4')
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _require_room(config: Config, run_dir: Path) -> None:
    """Raise where the checkpoints that are kept do not fit on the run folder's disk."""
    if "://" in config.checkpoint_url:
        return
    place = Path(config.checkpoint_url).absolute()
    while not place.exists():
        place = place.parent
    wanted = BYTES_PER_PARAMETER * parameter_count(config.model) * (config.checkpoint.keep + 1)
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise EnvironmentError(
            f"{place} has {show_bytes(free)} free, and {config.checkpoint.keep} checkpoints and one being written "
            f"take {show_bytes(wanted)}: make room, lower checkpoint.keep, or write checkpoint.dir elsewhere"
        )


def _lead(measured: int | None, cluster: Cluster, time_limit: str) -> int:
    """How long before its limit a job is told. Raises where saving takes so long that little would be left to train."""
    limit = seconds_of(time_limit)
    if measured is None:
        return min(cluster.lead_s, max(1, limit // 4))
    if 2 * measured > limit:
        raise ConfigError(
            f"--time {time_limit} is too short: by what earlier starts measured, an update and a checkpoint take so "
            f"long that the job must be told {measured} s before its end; ask for at least {-(-2 * measured // 60)} "
            "minutes"
        )
    return measured


def _git_commit(package: Path) -> str | None:
    """The commit of the code that was copied, `-dirty` where it was changed since."""
    try:
        done = subprocess.run(
            ["git", "-C", str(package), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
