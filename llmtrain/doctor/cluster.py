"""What does this Slurm offer of what the scripts in launch/slurm use?"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from llmtrain.doctor.finding import Finding, command

LEAST_KILL_WAIT_S = 30


def slurm(environment: Mapping[str, str]) -> list[Finding]:
    """What this Slurm offers of what the scripts in launch/slurm use."""
    if shutil.which("scontrol") is None:
        return [Finding("slurm", "note", "no Slurm here", "start with torchrun or deepspeed, or see launch/k8s")]
    text = command("scontrol", "show", "config")
    if text is None and not _slurm_is_meant(environment):
        return [Finding("slurm", "note", "Slurm's commands, but no cluster", "set SLURM_CONF where there is one")]
    if text is None:
        return [Finding("slurm", "wrong", "scontrol does not reach slurmctld", "see what `scontrol ping` says")]
    settings = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", text, re.MULTILINE))
    partitions = command("sinfo", "--noheader", "--format=%P %D nodes %G up to %l") or ""
    where = f", in job {environment['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environment else ""
    found = [Finding("slurm", "fine", f"version {settings.get('SLURM_VERSION', 'unknown')}{where}")]
    found += [Finding("slurm", "fine", f"partition {line}") for line in partitions.splitlines()]
    return [*found, *_slurm_settings(settings), *_containers()]


def _slurm_is_meant(environment: Mapping[str, str]) -> bool:
    places = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf")
    return bool({"SLURM_CONF", "SLURM_JOB_ID"} & environment.keys()) or any(Path(path).exists() for path in places)


def _slurm_settings(settings: Mapping[str, str]) -> list[Finding]:
    found = []
    if settings.get("JobRequeue", "1") == "0":
        remedy = "jobs must say --requeue, as those of launch/slurm do; where that is forbidden, submit again by hand"
        found.append(Finding("slurm", "note", "JobRequeue=0", remedy))
    wait = re.match(r"\d+", settings.get("KillWait", ""))
    if wait and int(wait[0]) < LEAST_KILL_WAIT_S:
        remedy = "a preempted run has so long to save: raise KillWait, or save more often (checkpoint.every)"
        found.append(Finding("slurm", "note", f"KillWait is {wait[0]} s", remedy))
    if "none" in settings.get("AccountingStorageType", "none"):
        remedy = "sacct knows nothing of ended jobs: `llmtrain slurm status RUN` reads the run's own record"
        found.append(Finding("slurm", "note", "no accounting", remedy))
    if "contain" not in settings.get("PrologFlags", "").lower():
        remedy = "what a job leaves behind is not ended with it: ask for PrologFlags=Contain"
        found.append(Finding("slurm", "note", f"PrologFlags={settings.get('PrologFlags', '(null)')}", remedy))
    return found


def _containers() -> list[Finding]:
    if "--container-image" in (command("srun", "--help") or ""):
        return [Finding("slurm", "fine", "containers through pyxis (srun --container-image)")]
    return [
        Finding("slurm", "note", "no pyxis", "train in a virtual environment, or with apptainer exec in the script")
    ]
