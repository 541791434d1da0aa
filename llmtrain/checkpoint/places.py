"""Where do checkpoints lie: on a disk, or behind any URL that fsspec knows (`s3://`, `gs://`, `memory://`)?

On a disk a checkpoint is written into `step_00001000.tmp` and published by one rename. An object store renames nothing:
there the files are written on a local disk, uploaded, and `manifest.json` last of all is what publishes them. Either
way a checkpoint that is listed as published was once whole. Options of a store (endpoint, credentials) come from
fsspec's own configuration and environment: https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration.

Every method raises OSError where the disk or the store refuses.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from typing_extensions import ParamSpec

from llmtrain.errors import CheckpointError
from llmtrain.units import show_bytes

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"

_NAME = re.compile(r"step_(\d{8,})(\.tmp|\.broken|\.superseded)?")
_BLOCK = 1 << 22
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Listing(NamedTuple):
    """Names of checkpoints, newest first, and what `latest` says."""

    published: list[str]
    unfinished: list[str]
    broken: list[str]  # set aside because they were not whole
    superseded: list[str]  # set aside because training went on from an older one
    latest: str | None


def name_of(step: int) -> str:
    """The folder of the checkpoint of an update."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The update a folder is named for; -1 where it is no checkpoint's name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else -1


def _as_oserror(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Stores raise kinds of their own (botocore, aiohttp): here all of them are the store refusing."""

    @functools.wraps(method)
    def wrapped(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            return method(*arguments, **named)
        except (OSError, CheckpointError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    return wrapped


class Place:
    """A folder of checkpoints. `staging` is a local folder for files on their way to a store; a disk needs none."""

    def __init__(self, url: str | Path, staging: Path | None = None) -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(url), use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f'checkpoint.dir "{url}": {error}') from None
        self.on_disk = isinstance(self.fs, LocalFileSystem)
        self.url = str(url).rstrip("/")
        self.staging = Path(self.root) if self.on_disk else staging

    def where(self, name: str) -> str:
        """What to call a checkpoint when speaking of it."""
        return f"{self.url}/{name}"

    @_as_oserror
    def listing(self) -> Listing:
        """What lies here."""
        names = sorted((name for name in self._names(self.root) if step_of(name) >= 0), key=step_of, reverse=True)
        kinds: dict[str, list[str]] = {"": [], ".tmp": [], ".broken": [], ".superseded": []}
        for name in names:
            kinds[self._kind(name)].append(name)
        latest = None
        with contextlib.suppress(OSError):
            latest = self.read(LATEST).decode(errors="replace").strip()
        return Listing(kinds[""], kinds[".tmp"], kinds[".broken"], kinds[".superseded"], latest)

    @_as_oserror
    def taken(self, name: str) -> bool:
        """Whether there is something published under a name, whole or not."""
        return bool(self.fs.exists(f"{self.root}/{name}" + ("" if self.on_disk else f"/{MANIFEST}")))

    @_as_oserror
    def read(self, file: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, all of them by default."""
        data: bytes = self.fs.cat_file(f"{self.root}/{file}", start=start, end=stop)
        return data

    @_as_oserror
    def size(self, file: str) -> int:
        """Bytes of a file."""
        return int(self.fs.info(f"{self.root}/{file}")["size"])

    def blocks(self, file: str) -> Iterator[bytes]:
        """A file's bytes, block by block."""
        size = self.size(file)
        for start in range(0, size, _BLOCK):
            yield self.read(file, start, min(size, start + _BLOCK))

    @_as_oserror
    def prepare(self, name: str, size: int) -> None:
        """Make an empty folder for a checkpoint's files. Raises OSError where the disk has no room for `size` bytes."""
        workspace = self.workspace(name)
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(parents=True)
        if self.free() < size:
            raise OSError(f"it takes {show_bytes(size)}, and {show_bytes(self.free())} are free: make room")

    def workspace(self, name: str) -> Path:
        """The local folder into which the files of a checkpoint are written, the same on every rank."""
        assert self.staging is not None, "a place without staging is only read"
        return self.staging / f"{name}.tmp"

    @_as_oserror
    def deliver(self, name: str, file: str) -> None:
        """A file of the workspace is written: bring it to the store."""
        if not self.on_disk:
            self.fs.put_file(str(self.workspace(name) / file), f"{self.root}/{name}/{file}")

    @_as_oserror
    def publish(self, name: str, manifest: dict[str, Any]) -> None:
        """Make a checkpoint whose files are all delivered a published one."""
        workspace = self.workspace(name)
        write_json(workspace / MANIFEST, manifest)
        if self.on_disk:
            sync_file(workspace)
            workspace.rename(Path(self.root) / name)
            sync_file(Path(self.root))
        else:
            self.deliver(name, MANIFEST)
            shutil.rmtree(workspace, ignore_errors=True)

    @_as_oserror
    def point_to(self, name: str) -> None:
        """Let `latest` name a checkpoint."""
        if not self.on_disk:
            self.fs.pipe_file(f"{self.root}/{LATEST}", f"{name}\n".encode())
            return
        pointer = Path(self.root) / f"{LATEST}.tmp"
        with pointer.open("w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        pointer.replace(Path(self.root) / LATEST)

    @_as_oserror
    def set_aside(self, name: str, why: str) -> None:
        """Unpublish a checkpoint, and keep its files: `why` (broken, superseded) becomes part of a name."""
        if not self.on_disk:
            manifest = f"{self.root}/{name}/{MANIFEST}"
            if self.fs.exists(manifest):
                self.fs.mv(manifest, f"{manifest}.{why}")
            return
        path = Path(self.root) / name
        aside = path.with_name(f"{name}.{why}")
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            path.rename(aside)

    @_as_oserror
    def delete(self, name: str) -> None:
        """Delete a checkpoint, published or not, so that at no moment half of it looks published."""
        if not self.on_disk:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{name}/{MANIFEST}")
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(f"{self.root}/{name}", recursive=True)
            return
        path = Path(self.root) / name
        if not path.suffix:
            gone = self.workspace(name)
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
            path = gone
        shutil.rmtree(path, ignore_errors=True)

    def abandon(self, name: str) -> None:
        """Remove what an unfinished save left in its workspace."""
        shutil.rmtree(self.workspace(name), ignore_errors=True)

    @_as_oserror
    def probe(self, token: str) -> None:
        """Write a small file, to see whether anything can be written here at all."""
        if self.on_disk:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        else:
            assert self.staging is not None
            self.staging.mkdir(parents=True, exist_ok=True)
        self.fs.pipe_file(f"{self.root}/probe_{token}", b"x")

    def sees_probe(self, token: str, within_s: float) -> bool:
        """Whether the file that another rank wrote is seen here: a network disk may take a while."""
        deadline = time.monotonic() + within_s
        while True:
            with contextlib.suppress(OSError):
                if self.size(f"probe_{token}") == 1:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def remove_probe(self, token: str) -> None:
        with contextlib.suppress(Exception):
            self.fs.rm_file(f"{self.root}/probe_{token}")

    def free(self) -> int:
        """Bytes free on the local disk that files are written to."""
        assert self.staging is not None
        return shutil.disk_usage(self.staging).free

    def _kind(self, name: str) -> str:
        """What a checkpoint is: published (empty), `.tmp`, `.broken` or `.superseded`."""
        if self.on_disk:
            return Path(name).suffix
        files = self._names(f"{self.root}/{name}")
        aside = [Path(file).suffix for file in files if file.startswith(f"{MANIFEST}.")]
        return "" if MANIFEST in files else aside[0] if aside else ".tmp"

    def _names(self, folder: str) -> list[str]:
        try:
            return [Path(str(entry)).name for entry in self.fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []


def write_json(path: Path, value: Any) -> None:
    """Write JSON and sync it to disk."""
    with path.open("w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
