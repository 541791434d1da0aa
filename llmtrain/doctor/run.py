"""Will this run find its data and keep what it saves: folders, caches, wandb?"""

import contextlib
import netrc
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from llmtrain.config import Config
from llmtrain.data.dataset import open_data
from llmtrain.doctor.finding import Finding
from llmtrain.errors import LlmtrainError
from llmtrain.model.size import parameter_count
from llmtrain.units import show_bytes

SAVED_BYTES = 12  # a parameter in a checkpoint: fp32 weight and two moments
VOLATILE = ("tmpfs", "ramfs")
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse", "panfs", "wekafs", "9p", "virtiofs")


def run_folder(config: Config) -> list[Finding]:
    """Whether the run's folder is on a disk that lasts, takes what will be saved, and publishes by rename."""
    folder = Path(config.run.dir)
    there = _existing(folder)
    kind = file_system(there, Path("/proc/self/mounts"))
    free = shutil.disk_usage(there).free
    found = f"{folder} on {kind or 'a disk'}, {show_bytes(free)} free"
    if problem := _rename_problem(there):
        return [Finding("run folder", "wrong", f"{found}: {problem}", "use another run.dir")]
    if kind in VOLATILE:
        return [
            Finding("run folder", "wrong", f"{found}: it is memory, and lost with this node", "use another run.dir")
        ]
    wanted = (config.checkpoint.keep + 1) * SAVED_BYTES * parameter_count(config.model)
    if not config.checkpoint.dir and free < wanted:
        remedy = f"make room, lower checkpoint.keep ({config.checkpoint.keep}), or write checkpoint.dir"
        return [Finding("run folder", "wrong", f"{found}, checkpoints will take {show_bytes(wanted)}", remedy)]
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


def wandb(config: Config, environment: Mapping[str, str]) -> list[Finding]:
    """Whether rows will arrive at Weights & Biases. Credentials are looked for, never shown."""
    mode = environment.get("WANDB_MODE") or config.logging.wandb.mode
    if mode != "online":
        remedy = "`wandb sync RUN/wandb/offline-*` sends it later" if mode == "offline" else ""
        return [Finding("wandb", "fine", mode, remedy)]
    if environment.get("WANDB_API_KEY") or _in_netrc("api.wandb.ai"):
        return [Finding("wandb", "fine", "online, with credentials")]
    remedy = "run `wandb login` once, or --set logging.wandb.mode=offline; without, the run is logged offline"
    return [Finding("wandb", "wrong", "online, but no credentials", remedy)]


def caches(environment: Mapping[str, str]) -> list[Finding]:
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
