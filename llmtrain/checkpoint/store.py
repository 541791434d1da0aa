"""Which checkpoints does a run have, and which of them can be trusted?

A checkpoint is a folder `step_00001000/`: the ranks' files, `state.json`, and `manifest.json` with the size and hash of
each. It is written beside, synced to disk, and published by one rename; `latest` follows, by write and rename. So a
folder that carries the final name is whole, unless the disk lied, and that the hashes tell. Every method is collective.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from llmtrain.checkpoint.flat import RANK_FILE, FlatReader, write_rank_file
from llmtrain.distributed import World
from llmtrain.engines.base import FlatState
from llmtrain.errors import CheckpointError

FORMAT = 1


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

    def save(self, flat: FlatState, state: dict[str, Any]) -> str | None:
        """Publish a checkpoint of `flat.update`. Returns None, or what went wrong, on every rank; older ones stay."""
        final = self.folder / f"step_{flat.update:08d}"
        temporary = final.with_name(final.name + ".tmp")
        if self.world.any(self.world.first and final.exists()):
            return None
        problem = self._try(lambda: _fresh_folder(temporary)) if self.world.first else ""
        if not self.world.any(bool(problem)):
            entry = ""
            if flat.writes:
                path = temporary / RANK_FILE.format(self.world.rank)
                problem = self._try(lambda: _write_and_sync(path, flat))
                entry = json.dumps(_fingerprint(path)) if not problem else ""
            entries = [json.loads(text) for text in self.world.gather_text(entry) if text]
            if not self.world.any(bool(problem)) and self.world.first:
                problem = self._try(lambda: self._publish(temporary, final, entries, {"format": FORMAT, **state}))
        problems = [text for text in self.world.gather_text(problem) if text]
        if problems:
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            return problems[0]
        if self.world.first:
            self._delete_old()
        self.world.barrier()
        return None

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and for each newer one that is not, why it was passed over."""
        rejected: list[str] = []
        steps = sorted((p.name for p in self.folder.glob("step_*") if p.suffix != ".tmp"), reverse=True)
        for name in self.world.gather_text(",".join(steps[:20]))[0].split(","):
            if not name:
                continue
            fault = self.fault(self.folder / name)
            if not fault:
                return open_checkpoint(self.folder / name), rejected
            rejected.append(f"{name}: {fault}")
        return None, rejected

    def fault(self, path: Path) -> str:
        """What is wrong with a checkpoint, by file name; empty where nothing is. Ranks share the hashing."""
        entries, found = _manifest(path)
        for entry in entries[self.world.rank :: self.world.size]:
            file = path / entry["file"]
            if not file.is_file():
                found = f"{entry['file']} is missing"
            elif file.stat().st_size != entry["bytes"]:
                found = f"{entry['file']} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
            elif _hash(file) != entry["xxh3_128"]:
                found = f"{entry['file']} is not what was written: its hash differs from the manifest"
        return next((text for text in self.world.gather_text(found) if text), "")

    def _publish(self, temporary: Path, final: Path, entries: list[dict[str, Any]], state: dict[str, Any]) -> None:
        _write_json(temporary / "state.json", state)
        _write_json(temporary / "manifest.json", {"files": [*entries, _fingerprint(temporary / "state.json")]})
        _sync(temporary)
        temporary.rename(final)
        _sync(self.folder)
        pointer = self.folder / "latest.tmp"
        pointer.write_text(final.name + "\n")
        pointer.replace(self.folder / "latest")

    def _delete_old(self) -> None:
        published = sorted(p for p in self.folder.glob("step_*") if p.suffix != ".tmp")
        for old in published[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _try(self, action: Any) -> str:
        try:
            action()
        except OSError as error:
            return f"rank {self.world.rank}: {error}"
        return ""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder. Raises CheckpointError where it is not one."""
    entries, fault = _manifest(path)
    if fault:
        raise CheckpointError(f"{path}: {fault}")
    files = [path / entry["file"] for entry in entries if entry["file"].startswith("rank_")]
    state = json.loads((path / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    return Checkpoint(path, state, FlatReader(files))


def _manifest(path: Path) -> tuple[list[dict[str, Any]], str]:
    try:
        entries = json.loads((path / "manifest.json").read_text())["files"]
    except FileNotFoundError:
        return [], "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], f"manifest.json is not readable: {error}"
    return entries, "" if entries else "manifest.json lists no files"


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _write_and_sync(path: Path, flat: FlatState) -> None:
    write_rank_file(path, flat)
    _sync(path)


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
