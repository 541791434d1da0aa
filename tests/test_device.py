"""Which GPU is this process', and what if there should be one and is none?"""

from pathlib import Path

import pytest
import torch

from llmtrain import distributed
from llmtrain.device import choose_gpu, given_gpus, host_threads, require_no_gpus_given
from llmtrain.distributed import Place
from llmtrain.errors import EnvironmentError

SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "8"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("visible", "environment", "index"),
    [
        (8, TORCHRUN, 3),
        (4, SRUN, 3),
        (1, {**SRUN, "SLURM_GPUS_PER_TASK": "1"}, 0),
        (1, {**SRUN, "SLURM_GPUS_PER_TASK": "a100:1"}, 0),
        (1, {**SRUN, "SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"}, 0),
        (1, {**SRUN, "SLURM_STEP_GPUS": "0,1,2,3"}, 0),
        (1, {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "3"}, 0),
        (1, SRUN, None),
        (1, {**SRUN, "SLURM_STEP_GPUS": "0"}, None),
        (1, {**SRUN, "SLURM_TRES_PER_TASK": "cpu=8"}, None),
        (1, {**SRUN, **TORCHRUN, "SLURM_GPUS_PER_TASK": "1"}, None),
        (1, {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "0"}, None),
        (2, {**SRUN, "SLURM_GPUS_PER_TASK": "2"}, None),
    ],
)
def test_each_process_takes_its_own_gpu(visible: int, environment: dict[str, str], index: int | None) -> None:
    """A job with a GPU a task would be refused, or two ranks would share one and die of memory."""
    if index is None:
        with pytest.raises(EnvironmentError, match=f"local rank 3 has no GPU: {visible} visible"):
            choose_gpu(visible, 3, 4, environment)
    else:
        assert choose_gpu(visible, 3, 4, environment) == index


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"SLURM_GPUS": "2"}, "SLURM_GPUS=2"),
        ({"SLURM_GPUS_PER_NODE": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "2"}, "CUDA_VISIBLE_DEVICES=2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0", "SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"DS_ACCELERATOR": "cpu", "SLURM_JOB_GPUS": "0,1"}, ""),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1"}, "NVIDIA_VISIBLE_DEVICES=GPU-1"),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, ""),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0,1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_JOB_GPUS": "0,1"}, ""),
    ],
)
def test_a_job_that_was_given_gpus_and_sees_none_is_stopped(
    environment: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight GPUs would be paid for while the CPU trains, for days until somebody looks."""
    assert given_gpus(environment, tmp_path) == said
    if not said:
        require_no_gpus_given(environment, tmp_path)
        return
    for built, remedy in ((None, "install a CUDA build"), ("13.0", "nvidia-smi")):
        monkeypatch.setattr(torch.version, "cuda", built)
        with pytest.raises(EnvironmentError, match=f"given GPUs .{said}.*{remedy}.*CUDA_VISIBLE_DEVICES= llmtrain"):
            require_no_gpus_given(environment, tmp_path)


def test_device_files_say_that_there_are_gpus(tmp_path: Path) -> None:
    """A workstation with a CPU build of torch would train on its CPU, with a GPU idle beside it."""
    (tmp_path / "nvidiactl").touch()
    assert given_gpus({}, tmp_path) == ""
    (tmp_path / "nvidia0").touch()
    assert given_gpus({}, tmp_path) == f"{tmp_path}/nvidia0"
    assert given_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ""


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 12),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({**TORCHRUN, "OMP_NUM_THREADS": "1"}, 12),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({**SRUN, "SLURM_CPUS_PER_TASK": "24"}, 24),
        ({**SRUN, "SLURM_CPUS_PER_TASK": "200"}, 96),
        ({**TORCHRUN, "SLURM_CPUS_PER_TASK": "96"}, 12),
    ],
)
def test_threads_beside_a_gpu_are_its_part_of_the_node(environment: dict[str, str], count: int) -> None:
    """AdamW on the host would run on one core under torchrun, or eight ranks would fight over all of them."""
    assert host_threads(96, 8, environment) == count


def test_a_world_of_gpus_takes_its_gpu_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with a GPU of its own would ask for one that it does not see."""
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch, "set_num_threads", done.append)
    monkeypatch.setattr(distributed, "usable_cores", lambda: 32)
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SRUN, "SLURM_GPUS_PER_TASK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed._device(Place(3, 8, 3, 4)) == torch.device("cuda", 0)
    assert done == [0, 8]
