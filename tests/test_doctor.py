"""`llmtrain doctor` finds what would stop a run, says what to do, and never shows a credential."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.doctor import cluster, finding, run
from llmtrain.doctor import examine as module_examine
from llmtrain.doctor import machine as probes
from llmtrain.doctor.examine import examine
from llmtrain.doctor.finding import Finding

SCONTROL = """Configuration data as of today
AccountingStorageType   = accounting_storage/none
JobRequeue              = 0
KillWait                = 10 sec
PrologFlags             = Alloc
SLURM_VERSION           = 23.11.4
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all of PATH, and a home without anything."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("SLURM", "WANDB", "HF_", "RANK"))]:
        monkeypatch.delenv(name)
    return commands


def command(folder: Path, name: str, prints: str, code: int = 0) -> None:
    """A program that prints this."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{prints}\nEND\nexit {code}\n")
    path.chmod(0o755)


def config_of(prepared: dict[str, Any], tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prepared))
    return load_config(path, [f"run.dir={tmp_path / 'run'}", *overrides])


def found(findings: list[Finding], probe: str) -> list[str]:
    """Level, finding and remedy of a probe."""
    return [f"{one.level}: {one.found} > {one.remedy}" for one in findings if one.probe == probe]


def test_a_bare_machine_is_not_wrong(prepared: dict[str, Any], machine: Path, tmp_path: Path) -> None:
    """A login node without a GPU or Slurm would look broken, and a script would stop there."""
    findings = examine(config_of(prepared, tmp_path), {}, "llmtrain prepare")
    assert [one for one in findings if one.level == "wrong"] == []
    assert found(findings, "gpu")[0].startswith("note: no nvidia-smi")
    assert found(findings, "slurm")[0].startswith("note: no Slurm here")
    assert "samples; training needs no network" in found(findings, "data")[0]
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".llmtrain*"))


def test_each_thing_that_is_wrong_has_a_remedy(
    prepared: dict[str, Any], machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of a thousand GPUs would wait days in a queue to find out."""
    command(
        machine, "nvidia-smi", "0, NVIDIA H100 80GB HBM3, 81559, 9000, 570.1, 0\n1, NVIDIA H100, 81559, 0, 570.1, 2"
    )
    command(machine, "scontrol", "", code=1)
    monkeypatch.setattr(probes, "PACKAGES", ("torch", "no_such_package"))
    monkeypatch.setattr(run, "file_system", lambda path, mounts: "tmpfs")
    config = config_of(prepared, tmp_path, f"data.path={tmp_path / 'nothing'}", "logging.wandb.mode=online")
    environment = {"RANK": "0", "SLURM_JOB_ID": "7", "HF_HUB_OFFLINE": "1"}
    findings = examine(config, environment, "llmtrain prepare --config c.yaml")
    wrong = {one.probe: one for one in findings if one.level == "wrong"}
    assert all(one.remedy for one in wrong.values())
    said = {name: f"{one.found} > {one.remedy}" for name, one in wrong.items()}
    assert "missing: no_such_package > pip install" in said["packages"]
    if torch.version.cuda is None:
        assert "built for the CPU, but" in said["torch"]
    assert "RANK set outside of a launcher > unset RANK" in said["environment"]
    assert "scontrol does not reach slurmctld" in said["slurm"]
    assert "it is memory, and lost with this node" in said["run folder"]
    assert said["data"].endswith("where there is network: llmtrain prepare --config c.yaml")
    assert said["wandb"].startswith("online, but no credentials > run `wandb login`")
    assert "but nothing was fetched" in found(findings, "caches")[0]
    assert found(findings, "gpu") == [
        "wrong: GPU 0: NVIDIA H100 80GB HBM3, 80 GiB, driver 570.1, 9 GiB in use > see nvidia-smi for whose they are",
        "wrong: GPU 1: NVIDIA H100, 80 GiB, driver 570.1, 2 uncorrected memory errors > leave this node out: --exclude",
    ]


def test_a_cluster_is_read(machine: Path) -> None:
    """A job would not be requeued, or be killed while it saves, and the site's settings would have told."""
    command(machine, "scontrol", SCONTROL)
    command(machine, "sinfo", "gpu* 4 nodes gpu:8 up to 1-00:00:00")
    command(machine, "srun", "  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH")
    said = found(cluster.slurm({"SLURM_JOB_ID": "12"}), "slurm")
    assert said[:2] == ["fine: version 23.11.4, in job 12 > ", "fine: partition gpu* 4 nodes gpu:8 up to 1-00:00:00 > "]
    assert [line.split(" > ")[0] for line in said[2:]] == [
        "note: JobRequeue=0",
        "note: KillWait is 10 s",
        "note: no accounting",
        "note: PrologFlags=Alloc",
        "fine: containers through pyxis (srun --container-image)",
    ]


def test_credentials_are_found_and_never_shown(prepared: dict[str, Any], machine: Path, tmp_path: Path) -> None:
    """A key would stand in the log of every job."""
    config = config_of(prepared, tmp_path, "logging.wandb.mode=online")
    secret = "0123456789abcdef" * 2
    assert found(run.wandb(config, {"WANDB_API_KEY": secret}), "wandb") == ["fine: online, with credentials > "]
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {secret}\n")
    (tmp_path / ".netrc").chmod(0o600)
    findings = examine(config, {"WANDB_API_KEY": secret}, "")
    assert found(findings, "wandb") == ["fine: online, with credentials > "]
    assert secret not in str(findings)


def test_devices_and_disks_are_told_apart(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A port that is down or a folder that other nodes do not see would be called fine."""
    assert found(probes.infiniband(tmp_path), "infiniband")[0].startswith("note: no InfiniBand")
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    assert found(probes.infiniband(tmp_path), "infiniband")[0].startswith("note: not active: mlx5_1 > ")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path} lustre rw 0 0\nc {tmp_path}x tmpfs rw 0 0\n")
    assert run.file_system(tmp_path / "run", mounts) == "lustre"
    assert run.file_system(Path("/"), mounts) == "ext4"
    config = config_of(prepared, tmp_path, "model.ffn_size=1000000000000")
    [line] = found(run.run_folder(config), "run folder")
    assert line.startswith("wrong") and "checkpoints will take" in line and "checkpoint.keep (3)" in line


def test_what_hangs_is_a_finding_itself(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor would hang with the file system it is to examine."""
    for module in (module_examine, finding):
        monkeypatch.setattr(module, "WITHIN_S", 0.2)
    monkeypatch.setattr(run, "caches", lambda environment: time.sleep(600))
    command(machine, "nvidia-smi", "")
    (machine / "nvidia-smi").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    findings = examine(None, {}, "")
    assert found(findings, "caches")[0].startswith("wrong: no answer within 0.4 s > ")
    assert found(findings, "gpu") == [
        "wrong: nvidia-smi is there, but fails or hangs > see what nvidia-smi says; the driver may not be loaded"
    ]


def test_the_command_answers_scripts(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A batch script could not tell a good node from a bad one."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prepared))
    words = [sys.executable, "-m", "llmtrain", "doctor", "--config", str(path), "--json", "--set"]
    for override, wrong in ((f"run.dir={tmp_path / 'run'}", 0), (f"data.path={tmp_path}", 1)):
        environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
        done = subprocess.run([*words, override], env=environment, capture_output=True, text=True)
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["wrong"]) == (wrong, wrong), answer
        assert answer["node"] == socket.gethostname()
        assert {"probe", "level", "found", "remedy"} == set(answer["findings"][0])
