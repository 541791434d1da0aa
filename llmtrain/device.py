"""On which device does this process compute, and with how many threads beside it?

A launcher gives a node's processes all of its GPUs, of which each takes the one of its local rank, or, as
`srun --gpus-per-task=1` does, each a GPU of its own, which every one of them sees as device 0. A job that was given
GPUs and sees none is stopped: days later somebody would find it training on the CPU. Torch is loaded where that is told
alone: commands without it ask here for cores.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from llmtrain.errors import EnvironmentError

DEEPSPEED_LAUNCHER = "CROSS_RANK"  # a variable that it sets for its processes, and no other launcher
SLURM_GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_NODE")


def choose_gpu(visible: int, local_rank: int, local_size: int, environment: Mapping[str, str]) -> int:
    """The index of this process' GPU among the `visible` ones. Raises EnvironmentError where it has none."""
    if local_rank < visible:
        return local_rank
    if visible == 1 and _gpu_of_its_own(local_rank, local_size, environment):
        return 0
    raise EnvironmentError(
        f"local rank {local_rank} has no GPU: {visible} visible on {socket.gethostname()}; start one process per GPU"
    )


def _gpu_of_its_own(local_rank: int, local_size: int, environment: Mapping[str, str]) -> bool:
    """Whether the launcher says that the one GPU a process sees is not that of its neighbours."""
    seen = environment.get("CUDA_VISIBLE_DEVICES", "")
    if seen == str(local_rank):  # a script set it for each rank
        return True
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return False  # the processes of torchrun or deepspeed share what their one Slurm task sees
    if environment.get("SLURM_GPUS_PER_TASK", "") not in ("", "0") or "gpu" in environment.get(
        "SLURM_TRES_PER_TASK", ""
    ):
        return True
    of_step = [one for one in environment.get("SLURM_STEP_GPUS", "").split(",") if one]
    return len(of_step) >= local_size  # the step has one for each, and this process sees one


def require_no_gpus_given(environment: Mapping[str, str], device_files: Path = Path("/dev")) -> None:
    """Raise EnvironmentError where torch sees no GPU although this job was given some, unless the CPU is asked for."""
    given = given_gpus(environment, device_files)
    if not given:
        return
    import torch

    if torch.version.cuda is None:
        remedy = f"this torch, {torch.__version__}, is built for the CPU: install a CUDA build (https://pytorch.org)"
    else:
        remedy = (
            f"this torch is built for CUDA {torch.version.cuda}: `nvidia-smi` must run here and show a driver for that "
            "version or a newer one, and a container must be started with GPUs (docker --gpus all, apptainer --nv)"
        )
    raise EnvironmentError(
        f"this process on {socket.gethostname()} was given GPUs ({given}), but torch sees none; {remedy}; to train on "
        "the CPU, set CUDA_VISIBLE_DEVICES to nothing: CUDA_VISIBLE_DEVICES= llmtrain train ... (under the deepspeed "
        "launcher, which sets it itself: DS_ACCELERATOR=cpu deepspeed ...)"
    )


def given_gpus(environment: Mapping[str, str], device_files: Path = Path("/dev")) -> str:
    """What says that this process was given GPUs, as NAME=value or a file; empty where nothing does.

    The `deepspeed` launcher numbers its processes in CUDA_VISIBLE_DEVICES, on machines without a GPU too, so what it
    wrote says nothing; under it DS_ACCELERATOR=cpu asks for the CPU.
    """
    if environment.get("DS_ACCELERATOR") == "cpu":
        return ""
    visible = None if DEEPSPEED_LAUNCHER in environment else environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return ""
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible}"
    for name in SLURM_GPUS:
        if environment.get(name, "") not in ("", "0"):
            return f"{name}={environment[name]}"
    # "all" says nothing: images that CUDA comes in set it, on machines without a GPU too.
    if environment.get("NVIDIA_VISIBLE_DEVICES", "") not in ("", "all", "none", "void"):
        return f"NVIDIA_VISIBLE_DEVICES={environment['NVIDIA_VISIBLE_DEVICES']}"
    return str(next(iter(sorted(device_files.glob("nvidia[0-9]*"))), ""))


def host_threads(cores: int, local_size: int, environment: Mapping[str, str]) -> int:
    """Threads of a process beside its GPU: an optimizer on the host, and initial values, use them all.

    `cores` are those this process may run on. OMP_NUM_THREADS wins, but for the 1 that torchrun writes where nobody
    wrote anything.
    """
    asked = environment.get("OMP_NUM_THREADS", "").split(",")[0]  # "4,2" is for nested teams
    by_torchrun = asked == "1" and local_size > 1 and "TORCHELASTIC_RUN_ID" in environment
    if asked.isdigit() and not by_torchrun:
        return max(1, int(asked))
    of_task = environment.get("SLURM_CPUS_PER_TASK", "")
    if of_task.isdigit() and "RANK" not in environment:  # srun started this process, and these cores are its own
        return max(1, min(cores, int(of_task)))
    return max(1, cores // local_size)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
