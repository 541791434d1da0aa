"""Which checkpoints does a run have, and which of them can be trusted?

A checkpoint is a folder `step_00001000/`: the ranks' files, `state.json`, and `manifest.json` with the size and hash of
each. It is written beside, as `step_00001000.tmp`, synced to disk, and published by one rename; `latest` follows, by
write and rename. So a folder that carries the final name is whole, unless the disk lied, and that the hashes tell. One
that is not whole is passed over, and renamed to `.broken` at the next save, so that it neither stands in the way of a
new one nor counts among those kept. Every method is collective.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from llmtrain.checkpoint.flat import RANK_FILE, FlatReader, read_header, write_rank_file
from llmtrain.distributed import World
from llmtrain.engines.base import FlatState
from llmtrain.errors import CheckpointError

FORMAT = 1
LATEST = "latest"
APPEARS_WITHIN_S = 60.0

_NAME = re.compile(r"step_(\d{8,})(\.tmp|\.broken)?")


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole."""

    path: Path
    state: dict[str, Any]  # state.json: step, schedule, trajectory, provenance
    reader: FlatReader


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self._broken: list[str] = []  # names found not to be whole, still under their published name

    def save(self, flat: FlatState, state: dict[str, Any], problem: str = "") -> str | None:
        """Publish a checkpoint of `flat.update`. Returns None, or what went wrong, on every rank; older ones stay.

        A `problem` of any rank, met before, keeps all from saving.
        """
        final = self.folder / f"step_{flat.update:08d}"
        temporary = final.with_name(final.name + ".tmp")
        if self.world.any(self.world.first and final.exists()):
            if not self.fault(final):
                return None
            self._broken = [*{*self._broken, final.name}]
        if self.world.first and not problem:
            problem = self._try(lambda: self._make_place(temporary))
        problem = self._agree(problem)
        if not problem:
            problem = self._write(temporary, final, flat, {"format": FORMAT, **state})
        if problem:
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            return problem
        if self.world.first:
            self._point_to(final)
            self._delete_old(flat.update)
        self.world.barrier()
        return None

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and what was passed over on the way to it, and why."""
        listing = json.loads(self.world.gather_text(json.dumps(self._listing()) if self.world.first else "")[0])
        found = None
        rejected: list[str] = []
        self._broken = []
        for name in listing["published"]:
            fault = self.fault(self.folder / name)
            if not fault:
                found = open_checkpoint(self.folder / name)
                break
            rejected.append(f"{name}: {fault}")
            self._broken.append(name)
        newest = found.path.name if found else ""
        if found is not None:
            short = [name for name in listing["unfinished"] if _step(Path(name)) > _step(found.path)]
            rejected += [f"{name}: this save was cut short" for name in short]
        latest = listing["latest"]
        if latest not in (None, newest, *self._broken):
            why = "is older" if latest in listing["published"] else "does not exist"
            rejected.append(f'{LATEST}: it names "{latest}", which {why}')
        return found, rejected

    def fault(self, path: Path) -> str:
        """What is wrong with a checkpoint, by file name; empty where nothing is. Ranks share the hashing."""
        entries, found = _manifest(path)
        for entry in entries[self.world.rank :: self.world.size]:
            found = found or _file_fault(path / entry["file"], entry)
        return self._agree(found)

    def require_room(self, flat: FlatState) -> None:
        """Raise CheckpointError, before hours are spent, where the disk cannot take what is to be kept, or is no
        disk that all ranks share."""
        slices = flat.slices if flat.writes else []
        mine = sum(tensor.nbytes for piece in slices for tensor in piece.tensors.values())
        size = sum(int(text) for text in self.world.gather_text(str(mine)))
        probe = self.folder / f"probe_{self.world.gather_text(secrets.token_hex(4))[0]}"
        problem = self._agree(self._try(lambda: self._require_free(size, probe)) if self.world.first else "")
        if not problem and not _appears(probe):
            problem = f"rank {self.world.rank} does not see {self.folder}: run.dir must lie on a disk all nodes share"
        problem = self._agree(problem)
        if self.world.first:
            probe.unlink(missing_ok=True)
        if problem:
            raise CheckpointError(problem)

    def _write(self, temporary: Path, final: Path, flat: FlatState, state: dict[str, Any]) -> str:
        """Every rank its file, then the first rank the rest. Returns what went wrong, on every rank."""
        written: list[dict[str, Any]] = []
        problem = ""
        if flat.writes:
            path = temporary / RANK_FILE.format(self.world.rank)
            problem = self._try(lambda: written.append(_write_and_sync(path, flat)))
        problem = self._agree(problem)
        entries = [entry for text in self.world.gather_text(json.dumps(written)) for entry in json.loads(text)]
        if not problem and self.world.first:
            problem = self._try(lambda: _publish(temporary, final, entries, state))
        return self._agree(problem)

    def _listing(self) -> dict[str, Any]:
        """What lies in the folder: names of published and of unfinished checkpoints, newest first, and `latest`."""
        published, unfinished = [], []
        for path in sorted(self.folder.glob("step_*"), key=_step, reverse=True):
            match = _NAME.fullmatch(path.name)
            if match and match[2] is None:
                published.append(path.name)
            elif match and match[2] == ".tmp":
                unfinished.append(path.name)
        latest = None
        with contextlib.suppress(OSError):
            latest = (self.folder / LATEST).read_text(errors="replace").strip()
        return {"published": published, "unfinished": unfinished, "latest": latest}

    def _make_place(self, temporary: Path) -> None:
        """An empty folder to write into, and broken checkpoints out of the way."""
        for name in self._broken:
            aside = self.folder / f"{name}.broken"
            shutil.rmtree(aside, ignore_errors=True)
            if (self.folder / name).exists():
                (self.folder / name).rename(aside)
        self._broken = []
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _point_to(self, final: Path) -> None:
        """Let `latest` name the newest. It is for people: resuming goes by the manifests, so it may fail."""
        pointer = self.folder / f"{LATEST}.tmp"
        with contextlib.suppress(OSError):
            with pointer.open("w") as file:
                file.write(final.name + "\n")
                file.flush()
                os.fsync(file.fileno())
            pointer.replace(self.folder / LATEST)

    def _delete_old(self, update: int) -> None:
        """Keep the newest so many up to `update`, which was just published; delete what is older or was cut short."""
        paths = [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name)]
        kept = sorted(step for path in paths if not path.suffix and (step := _step(path)) <= update)[-self.keep :]
        for path in paths:
            if path.suffix != ".tmp" and _step(path) < kept[0]:
                gone = path.with_suffix(".tmp")  # never half a checkpoint under a published name
                with contextlib.suppress(OSError):
                    path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
            elif path.suffix == ".tmp":
                shutil.rmtree(path, ignore_errors=True)

    def _require_free(self, size: int, probe: Path) -> None:
        """Write a probe, and compare what is free with what checkpoints of `size` bytes will take."""
        self.folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        wanted = max(1, self.keep + 1 - len(self._listing()["published"])) * size
        free = shutil.disk_usage(self.folder).free
        if free < wanted:
            raise OSError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, the checkpoints to come take {wanted / 2**30:.2f} "
                f"({size / 2**30:.2f} each): make room, lower checkpoint.keep ({self.keep}), or use another run.dir"
            )

    def _agree(self, problem: str) -> str:
        """The first rank's problem that has one, on every rank."""
        return next((text for text in self.world.gather_text(problem) if text), "")

    def _try(self, action: Callable[[], Any]) -> str:
        try:
            action()
        except OSError as error:
            return f"rank {self.world.rank}: {error}"
        return ""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, without hashing it. Raises CheckpointError where it is not one."""
    entries, fault = _manifest(path)
    if fault:
        raise CheckpointError(f"{path}: {fault}")
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: state.json is not readable: {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    return Checkpoint(path, state, FlatReader([path / entry["file"] for entry in entries if _is_rank_file(entry)]))


def _manifest(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The manifest's entries, or what is wrong with it."""
    try:
        entries = json.loads((path / "manifest.json").read_text())["files"]
        files = [(Path(entry["file"]).name, int(entry["bytes"]), str(entry["xxh3_128"])) for entry in entries]
    except FileNotFoundError:
        return [], "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], f"manifest.json is not readable: {type(error).__name__}: {error}"
    if "state.json" not in [name for name, _, _ in files] or not any(map(_is_rank_file, entries)):
        return [], "manifest.json does not list state.json and the ranks' files"
    return entries, ""


def _is_rank_file(entry: dict[str, Any]) -> bool:
    return str(entry["file"]).startswith("rank_")


def _file_fault(file: Path, entry: dict[str, Any]) -> str:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file.name} has {size} bytes, the manifest says {entry['bytes']}"
        if _hash(file) != entry["xxh3_128"]:
            return f"{file.name} is not what was written: its hash differs from the manifest"
        if _is_rank_file(entry):
            read_header(file)
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    return ""


def _publish(temporary: Path, final: Path, entries: list[dict[str, Any]], state: dict[str, Any]) -> None:
    _write_json(temporary / "state.json", state)
    _write_json(temporary / "manifest.json", {"files": [*entries, _fingerprint(temporary / "state.json")]})
    _sync(temporary)
    temporary.rename(final)
    _sync(final.parent)


def _appears(path: Path) -> bool:
    """Whether a file is here, or comes to be seen: a network disk may take a while."""
    deadline = time.monotonic() + APPEARS_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _step(path: Path) -> int:
    """The update a folder is named for; -1 where it is no checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _write_and_sync(path: Path, flat: FlatState) -> dict[str, Any]:
    write_rank_file(path, flat)
    _sync(path)
    return _fingerprint(path)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "xxh3_128": _hash(path)}


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
