"""Will a run start here, and last?

Each probe looks at one thing that stops runs on clusters, and says what it found and, where that is a problem, what to
do. Probes only look (the one of the run folder writes a small file and removes it), load no torch, and stand absence:
what is not there is a note, not a failure. Each has two seconds: what hangs is itself the finding.

`wrong` is what keeps a run from starting or loses it; `note` is worth knowing; `fine` is the rest.
"""

import contextlib
import importlib.metadata
import importlib.util
import netrc
import os
import platform
import re
import resource
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from llmtrain.config import Config
from llmtrain.data.dataset import open_data
from llmtrain.errors import LlmtrainError
from llmtrain.model.size import parameter_count

WITHIN_S = 2.0
PACKAGES = ("torch", "deepspeed", "sentencepiece", "datasets", "wandb", "safetensors", "xxhash", "fsspec")
SAVED_BYTES = 12  # a parameter in a checkpoint: fp32 weight and two moments
VOLATILE = ("tmpfs", "ramfs")
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse", "panfs", "wekafs", "9p", "virtiofs")
LEAST_FILES = 4096
LEAST_KILL_WAIT_S = 30


class Finding(NamedTuple):
    """What one probe found."""

    probe: str
    level: Literal["fine", "note", "wrong"]
    found: str
    remedy: str = ""


Machine = Mapping[str, str]  # the environment


def examine(config: Config | None, environment: Machine, prepare_command: str) -> list[Finding]:
    """Every probe, side by side. With a config, its folders, data and logging too."""
    probes: dict[str, Callable[[], list[Finding]]] = {
        "packages": packages,
        "torch": torch_build,
        "gpu": gpus,
        "infiniband": lambda: infiniband(Path("/sys/class/infiniband")),
        "limits": limits,
        "environment": lambda: variables(environment),
        "caches": lambda: caches(environment),
        "slurm": lambda: slurm(environment),
    }
    if config is not None:
        probes |= {
            "run folder": lambda: run_folder(config),
            "data": lambda: data(config, prepare_command),
            "wandb": lambda: wandb(config, environment),
        }
    found: dict[str, list[Finding]] = {}
    threads = {name: threading.Thread(target=_run, args=(name, probes[name], found), daemon=True) for name in probes}
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(2 * WITHIN_S)
        if thread.is_alive():
            hung = f"no answer within {2 * WITHIN_S:g} s"
            found[name] = [Finding(name, "wrong", hung, "a file system or a service hangs: try it by hand")]
    return [finding for name in probes for finding in found[name]]


def _run(name: str, probe: Callable[[], list[Finding]], found: dict[str, list[Finding]]) -> None:
    try:
        found[name] = probe()
    except OSError as error:
        found[name] = [Finding(name, "wrong", str(error), "see whether the path is there and readable")]


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
    done = _command("nvidia-smi", query, "--format=csv,noheader,nounits")
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


def variables(environment: Machine) -> list[Finding]:
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


def caches(environment: Machine) -> list[Finding]:
    """Where Hugging Face's libraries keep what they fetch. Only `prepare` and `import` use them."""
    written = environment.get("HF_HOME")
    folder = Path(written or Path.home() / ".cache/huggingface")
    offline = environment.get("HF_HUB_OFFLINE") == "1"
    there = _existing(folder)
    if not os.access(there, os.W_OK):
        remedy = "export HF_HOME=... to a folder of yours on a large disk"
        return [Finding("caches", "wrong", f"{folder} is not writable", remedy)]
    free = shutil.disk_usage(there).free / 2**30
    found = f"{folder}, {free:.0f} GiB free{', HF_HUB_OFFLINE=1' if offline else ''}"
    if offline and not folder.exists():
        remedy = "llmtrain prepare a data set of the hub where there is network, with the same HF_HOME"
        return [Finding("caches", "note", f"{found}, but nothing was fetched", remedy)]
    if not written and free < 50:
        remedy = "llmtrain prepare may fetch many GiB: export HF_HOME=... to a large disk"
        return [Finding("caches", "note", found, remedy)]
    return [Finding("caches", "fine", found)]


def run_folder(config: Config) -> list[Finding]:
    """Whether the run's folder is on a disk that lasts, takes what will be saved, and publishes by rename."""
    folder = Path(config.run.dir)
    there = _existing(folder)
    kind = file_system(there, Path("/proc/self/mounts"))
    free = shutil.disk_usage(there).free
    found = f"{folder} on {kind or 'a disk'}, {free / 2**30:.1f} GiB free"
    if problem := _rename_problem(there):
        return [Finding("run folder", "wrong", f"{found}: {problem}", "use another run.dir")]
    if kind in VOLATILE:
        return [
            Finding("run folder", "wrong", f"{found}: it is memory, and lost with this node", "use another run.dir")
        ]
    wanted = (config.checkpoint.keep + 1) * SAVED_BYTES * parameter_count(config.model)
    if not config.checkpoint.dir and free < wanted:
        remedy = f"make room, lower checkpoint.keep ({config.checkpoint.keep}), or write checkpoint.dir"
        return [Finding("run folder", "wrong", f"{found}, checkpoints will take {wanted / 2**30:.1f}", remedy)]
    if kind.split(".")[0] not in SHARED:
        return [Finding("run folder", "note", found, "on several nodes: every node must see this folder")]
    return [Finding("run folder", "fine", found)]


def data(config: Config, prepare_command: str) -> list[Finding]:
    """Whether training will find its tokens, and needs nothing else of a network."""
    try:
        prepared = open_data(config.data.path, prepare_command)
        prepared.manifest.require_fits(config.model.vocab_size)
        count = prepared.num_samples(config.batch.seq_len)
    except LlmtrainError as error:
        remedy = f"where there is network: {prepare_command}"
        return [Finding("data", "wrong", str(error), remedy)]
    return [Finding("data", "fine", f"{config.data.path}: {count:,} samples; training needs no network")]


def wandb(config: Config, environment: Machine) -> list[Finding]:
    """Whether rows will arrive at Weights & Biases. Credentials are looked for, never shown."""
    mode = environment.get("WANDB_MODE") or config.logging.wandb.mode
    if mode != "online":
        remedy = "`wandb sync RUN/wandb/offline-*` sends it later" if mode == "offline" else ""
        return [Finding("wandb", "fine", mode, remedy)]
    if environment.get("WANDB_API_KEY") or _in_netrc("api.wandb.ai"):
        return [Finding("wandb", "fine", "online, with credentials")]
    remedy = "run `wandb login` once, or --set logging.wandb.mode=offline; without, the run is logged offline"
    return [Finding("wandb", "wrong", "online, but no credentials", remedy)]


def slurm(environment: Machine) -> list[Finding]:
    """What this Slurm offers of what the scripts in launch/slurm use."""
    if shutil.which("scontrol") is None:
        return [Finding("slurm", "note", "no Slurm here", "start with torchrun or deepspeed, or see launch/k8s")]
    text = _command("scontrol", "show", "config")
    if text is None and not _slurm_is_meant(environment):
        return [Finding("slurm", "note", "Slurm's commands, but no cluster", "set SLURM_CONF where there is one")]
    if text is None:
        return [Finding("slurm", "wrong", "scontrol does not reach slurmctld", "see what `scontrol ping` says")]
    settings = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", text, re.MULTILINE))
    partitions = _command("sinfo", "--noheader", "--format=%P %D nodes %G up to %l") or ""
    where = f", in job {environment['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environment else ""
    found = [Finding("slurm", "fine", f"version {settings.get('SLURM_VERSION', 'unknown')}{where}")]
    found += [Finding("slurm", "fine", f"partition {line}") for line in partitions.splitlines()]
    return [*found, *_slurm_settings(settings), *_containers()]


def _slurm_is_meant(environment: Machine) -> bool:
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
    if "--container-image" in (_command("srun", "--help") or ""):
        return [Finding("slurm", "fine", "containers through pyxis (srun --container-image)")]
    return [
        Finding("slurm", "note", "no pyxis", "train in a virtual environment, or with apptainer exec in the script")
    ]


def file_system(path: Path, mounts: Path) -> str:
    """The kind of the file system a path lies on: ext4, nfs4, tmpfs; empty where that is not told."""
    best = ("", "")
    with contextlib.suppress(OSError):
        for line in mounts.read_text().splitlines():
            _, point, kind, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            if path.resolve().is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, kind)
    return best[1]


def _rename_problem(folder: Path) -> str:
    """What goes wrong when a small file is written beside another and takes its place."""
    old, new = (folder / f".llmtrain.{secrets.token_hex(4)}" for _ in range(2))
    try:
        old.write_text("old")
        new.write_text("new")
        new.replace(old)
        return "" if old.read_text() == "new" else "a renamed file has not the content it was written with"
    except OSError as error:
        return f"it takes no files ({error.strerror})"
    finally:
        for path in (old, new):
            with contextlib.suppress(OSError):
                path.unlink()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _in_netrc(host: str) -> bool:
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False


def _command(*words: str) -> str | None:
    """What a command printed; None where it is not there, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
