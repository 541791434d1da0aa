"""What is on this machine: packages, torch's build, GPUs, network between nodes, limits, variables."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from llmtrain.doctor.finding import Finding, command

PACKAGES = ("torch", "deepspeed", "sentencepiece", "datasets", "wandb", "safetensors", "xxhash", "fsspec")
LEAST_FILES = 4096


def packages() -> list[Finding]:
    """Python and what training needs beside it."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    versions = [f"{name} {_version(name)}" for name in ("llmtrain", "torch", "deepspeed") if name not in missing]
    found = f"Python {platform.python_version()}, {', '.join(versions)}, on {socket.gethostname()}"
    if missing:
        return [
            Finding("packages", "wrong", f"{found}; missing: {', '.join(missing)}", "pip install 'llmtrain[train]'")
        ]
    compiler = (
        []
        if shutil.which(os.environ.get("CC", "cc"))
        else [
            Finding(
                "packages", "note", "no C compiler", "engine.compile needs one: load a compiler module, or leave it off"
            )
        ]
    )
    return [Finding("packages", "fine", found), *compiler]


def torch_build() -> list[Finding]:
    """For which CUDA torch was built, read from its files: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    with contextlib.suppress(OSError):
        text = Path(spec.origin).with_name("version.py").read_text()
        built = re.search(r"^cuda[^=]*= '([^']+)'", text, re.MULTILINE)
        if built is None:
            if shutil.which("nvidia-smi"):
                remedy = (
                    "install torch's CUDA build: pip install torch --index-url https://download.pytorch.org/whl/cu128"
                )
                return [Finding("torch", "wrong", "built for the CPU, but this machine has NVIDIA's tools", remedy)]
            return [Finding("torch", "note", "built for the CPU", "fine for trying; GPUs need torch's CUDA build")]
        nccl = _version(f"nvidia-nccl-cu{built[1].split('.')[0]}")
        return [Finding("torch", "fine", f"built for CUDA {built[1]}, NCCL {nccl}")]
    return []


def gpus() -> list[Finding]:
    """The GPUs, their memory, and whether another process has some of it."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("gpu", "note", "no nvidia-smi: no GPU here", "on a login node that is as it should be")]
    query = "--query-gpu=index,name,memory.total,memory.used,driver_version,ecc.errors.uncorrected.volatile.total"
    done = command("nvidia-smi", query, "--format=csv,noheader,nounits")
    if done is None:
        remedy = "see what nvidia-smi says; the driver may not be loaded"
        return [Finding("gpu", "wrong", "nvidia-smi is there, but fails or hangs", remedy)]
    return [_gpu(*[field.strip() for field in line.split(",")]) for line in done.splitlines() if line.strip()]


def _gpu(index: str, name: str, total: str, used: str, driver: str, errors: str) -> Finding:
    found = f"GPU {index}: {name}, {int(total) / 1024:.0f} GiB, driver {driver}"
    if errors.isdigit() and int(errors):
        return Finding("gpu", "wrong", f"{found}, {errors} uncorrected memory errors", "leave this node out: --exclude")
    if int(used) > int(total) / 10:
        return Finding(
            "gpu", "wrong", f"{found}, {int(used) / 1024:.0f} GiB in use", "see nvidia-smi for whose they are"
        )
    return Finding("gpu", "fine", found)


def infiniband(folder: Path) -> list[Finding]:
    """Ports between nodes, and whether memory may be locked for them."""
    states = {path.parent.parent.parent.name: path.read_text() for path in folder.glob("*/ports/*/state")}
    if not states:
        remedy = "between nodes NCCL then uses TCP, which is several times slower"
        return [Finding("infiniband", "note", "no InfiniBand or RoCE device", remedy)]
    down = [name for name, state in sorted(states.items()) if "ACTIVE" not in state]
    found = [Finding("infiniband", "fine", f"{len(states) - len(down)} of {len(states)} devices active")]
    if down:
        remedy = "where other nodes have them active, leave this node out; else name the good ones in NCCL_IB_HCA"
        found = [Finding("infiniband", "note", f"not active: {', '.join(down)}", remedy)]
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        remedy = "NCCL cannot register memory: ulimit -l unlimited, or in Slurm PropagateResourceLimitsExcept=MEMLOCK"
        found.append(Finding("infiniband", "wrong", "locked memory is limited", remedy))
    return found


def limits() -> list[Finding]:
    """Open files: shards, sockets and workers take thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        remedy = f"ulimit -n {LEAST_FILES if hard >= LEAST_FILES else hard} in the job's script"
        return [Finding("limits", "note", f"{soft} open files at most", remedy)]
    return [Finding("limits", "fine", f"{soft} open files at most")]


def variables(environment: Mapping[str, str]) -> list[Finding]:
    """Variables that make a run something else than its command says."""
    found = []
    stray = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    if stray and "TORCHELASTIC_RUN_ID" not in environment and "SLURM_PROCID" not in environment:
        remedy = f"unset {' '.join(stray)}: a run started by hand would wait for ranks that never come"
        found.append(Finding("environment", "wrong", f"{', '.join(stray)} set outside of a launcher", remedy))
    if environment.get("CUDA_LAUNCH_BLOCKING") == "1":
        found.append(Finding("environment", "note", "CUDA_LAUNCH_BLOCKING=1", "for debugging only: unset it"))
    if environment.get("PYTHONPATH"):
        shown = f"PYTHONPATH={environment['PYTHONPATH']}"
        found.append(Finding("environment", "note", shown, "other packages may come before those of this environment"))
    return found or [Finding("environment", "fine", "nothing in the way of a launcher")]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
