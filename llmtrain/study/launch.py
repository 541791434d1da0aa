"""How does a study start a training? As a process of the door that users open, its output in a log.

The process has the environment of this one but for its threads, how these wait, and, where there are several GPUs, the
one it may use. It ends as every training does: SIGTERM lets it save, then it exits with 0. No torch here.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start_training(
    config_path: Path, threads: int, log: Path, *, gpu: str | None = None, kept_open: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    """Train the run that a config describes, resuming it where it has a checkpoint. What it says is added to `log`.

    `threads` are those of one process on a CPU, `gpu` is one of `gpus()`. `kept_open` are file descriptors that live as
    long as the training does.
    """
    # Threads that spin while they wait for one that has no core cost a tenfold on a machine that others use too.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": str(threads)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "llmtrain", "train", "--config", str(config_path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=tuple(kept_open),
        )


def gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them. Empty where there are none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
