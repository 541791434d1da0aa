"""The doors as users open them: `deepspeed`, `torchrun` and plain `python`, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DEMO = "configs/demo_cosine.yaml"
DOORS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
    "python": [sys.executable],
}


def run(words: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command from the root of the project, as a user would."""
    # PATH lets the launchers find ninja and the compiler they build an extension with.
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**kept, "PATH": path, **environment}
    )


@pytest.fixture(scope="module")
def demo(prepared: dict[str, Any]) -> list[str]:
    """The demo config on the small data, with a small model: what the doors do with it is what counts."""
    small = {
        "model": prepared["model"],
        "data": prepared["data"],
        "batch": {**prepared["batch"], "global_tokens": None},
    }
    words = ["--config", DEMO]
    for section, values in small.items():
        for key, value in values.items():
            words += ["--set", f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True).strip()}"]
    words += ["--set", "model.preset=null", "--set", "run.stop_at=20 steps", "--set", "engine.precision=fp32"]
    return [word.removesuffix("\n...") for word in words]


def test_every_door_trains_the_same_run(demo: list[str], tmp_path: Path) -> None:
    """A user who changes the launcher would change the training."""
    kinds = {"deepspeed": [], "torchrun": ["engine.kind=fsdp"], "python": ["engine.kind=single"]}
    losses, rates = {}, {}
    for name, door in DOORS.items():
        overrides = [word for text in (*kinds[name], f"run.dir={tmp_path / name}") for word in ("--set", text)]
        done = run([*door, "launch/pretrain.py", *demo, *overrides])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FRESH START" in done.stdout
        assert "FINISHED" in done.stdout
        rows = [row for row in read_metrics(tmp_path / name) if row["kind"] == "step"]
        assert [row["step"] for row in rows] == list(range(1, 21))
        losses[name] = [row["loss"] for row in rows]
        rates[name] = [row["lr"] for row in rows]
    assert rates["deepspeed"] == rates["torchrun"] == rates["python"]
    np.testing.assert_allclose(losses["deepspeed"], losses["python"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses["torchrun"], losses["python"], rtol=0, atol=1e-5)


def test_deepspeed_without_the_data_says_how_to_prepare_it() -> None:
    """A user on a new machine would get a traceback from every rank."""
    config = "configs/7b_cosine.yaml"
    done = run([str(BIN / "deepspeed"), "--num_gpus", "2", "launch/pretrain.py", "--config", config])
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert said.count("there is no prepared data") == 1
    assert f"llmtrain prepare --config {config}" in said
    assert "Traceback" not in said


def test_the_installed_command_says_the_same() -> None:
    """`llmtrain train` would behave otherwise than launch/pretrain.py."""
    done = run([str(BIN / "llmtrain"), "train", "--config", DEMO, "--set", "batch.mcro=4"])
    assert (done.returncode, done.stdout) == (2, "")
    assert 'unknown key "batch.mcro"; did you mean "micro"?' in done.stderr
    assert "Traceback" not in done.stderr
