"""Which checkpoints does a run have, and which of them can be trusted?

A checkpoint is a folder `step_00001000/`: the ranks' files, `index.json`, which says what each of them holds,
`state.json`, and `manifest.json` with the size and hash of each. `llmtrain.checkpoint.places` knows how one is
published whole, or not at all. So a folder that carries the final name is whole, unless the disk lied, and that the
hashes tell. One that is not whole is passed over, and set aside as `.broken` at the next save, so that it neither
stands in the way of a new one nor counts among those kept. A checkpoint without an index is read too. Every method
is collective.
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from llmtrain.checkpoint.files import write_file
from llmtrain.checkpoint.flat import RANK_FILE, FlatReader, read_header, write_rank_file
from llmtrain.checkpoint.index import INDEX, index_bytes, layout_of, packed, read_index, unpacked
from llmtrain.checkpoint.places import LATEST, MANIFEST, STATE, Place, name_of, step_of, sync_file, write_json
from llmtrain.distributed import World
from llmtrain.engines.base import FlatState
from llmtrain.errors import CheckpointError
from llmtrain.units import show_bytes

FORMAT = 1
APPEARS_WITHIN_S = 60.0


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole."""

    path: str  # its folder or URL
    state: dict[str, Any]  # state.json: step, schedule, trajectory, provenance
    reader: FlatReader

    @property
    def step(self) -> int:
        """The update it was saved after."""
        return int(self.state["step"])


def doomed(published: Sequence[tuple[int, bool]], update: int, keep: int, keep_every: int | None) -> list[int]:
    """Which of the published checkpoints, as (step, ephemeral), go now that the one of `update` is there.

    Kept are the newest `keep` permanent ones, those at a multiple of `keep_every`, the newest two of any kind, and
    whatever is newer than `update`, which another run of the same folder left.
    """
    steps = sorted(step for step, _ in published if step <= update)
    permanent = sorted(step for step, ephemeral in published if step <= update and not ephemeral)
    kept = {*steps[-2:], *permanent[-keep:]}
    if keep_every is not None:
        kept |= {step for step in permanent if step % keep_every == 0}
    return [step for step in steps if step not in kept]


class CheckpointStore:
    """The checkpoints of one run: a folder or any fsspec URL, with a local folder for files on their way to one."""

    def __init__(
        self,
        folder: Path | str,
        world: World,
        keep: int,
        *,
        keep_every: int | None = None,
        staging: Path | None = None,
    ) -> None:
        self.place = Place(folder, staging)
        self.world = world
        self.keep = keep
        self.keep_every = keep_every
        self._broken: list[str] = []  # found not to be whole, not set aside yet
        self._bytes = 0  # of one checkpoint

    def save(
        self,
        flat: FlatState,
        state: dict[str, Any],
        problem: str = "",
        *,
        metadata: dict[str, str] | None = None,
        ephemeral: bool = False,
    ) -> str | None:
        """Publish a checkpoint of `flat.update`. Returns None, or what went wrong, on every rank; older ones stay.

        `state` is what the first rank writes to state.json, `metadata` what each writes into its own file. A `problem`
        of any rank, met before, keeps all from saving.
        """
        name = name_of(flat.update)
        taken = False
        if self.world.first and not problem:
            try:
                taken = self.place.taken(name)
            except OSError as error:
                problem = f"rank {self.world.rank}: {error}"
        if self.world.any(taken):
            if not self.fault(name):
                return None
            self._broken = [*{*self._broken, name}]
        if self.world.first and not problem:
            problem = self._try(lambda: self._make_place(name))
        problem = self._agree(problem)
        if not problem:
            problem = self._write(name, flat, {"format": FORMAT, **state}, metadata or {}, ephemeral)
        if problem:
            if self.world.first:
                self.place.abandon(name)
            return problem
        if self.world.first:
            with contextlib.suppress(OSError):  # for people: resuming goes by the manifests
                self.place.point_to(name)
            with contextlib.suppress(OSError):
                self._delete_old(flat.update)
        self.world.barrier()
        return None

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and what was passed over on the way to it, and why.

        Raises CheckpointError where the place cannot be read.
        """
        listing = self._listing()
        found = None
        rejected: list[str] = []
        self._broken = []
        for name in listing["published"]:
            fault = self.fault(name)
            if not fault:
                found = open_checkpoint(self.place, name)
                break
            rejected.append(f"{name}: {fault}")
            self._broken.append(name)
        newest = name_of(found.step) if found else ""
        if found is not None:
            short = [name for name in listing["unfinished"] if step_of(name) > found.step]
            rejected += [f"{name}: this save was cut short" for name in short]
        latest = listing["latest"]
        if latest not in (None, newest, *self._broken):
            why = "is older" if latest in listing["published"] else "does not exist"
            rejected.append(f'{LATEST}: it names "{latest}", which {why}')
        return found, rejected

    def pick(self, step: int | None) -> tuple[Checkpoint, list[str]]:
        """The whole checkpoint of `step`, or the newest, and what was passed over. Raises CheckpointError."""
        if step is not None:
            return self.require(step), []
        found, rejected = self.newest_valid()
        if found is None:
            raise CheckpointError(f"{self.place.url} holds no whole checkpoint" + "".join(f"\n  {r}" for r in rejected))
        return found, rejected

    def require(self, step: int) -> Checkpoint:
        """The whole checkpoint of an update. Raises CheckpointError, with those there are, where there is none."""
        fault = self.fault(name_of(step))
        if fault:
            held = ", ".join(str(step_of(name)) for name in reversed(self._listing()["published"]))
            raise CheckpointError(
                f"{self.place.where(name_of(step))}: {fault}; {self.place.url} holds the checkpoints of "
                + (f"updates {held}" if held else "no update")
            )
        return open_checkpoint(self.place, name_of(step))

    def supersede(self, step: int) -> list[str]:
        """Set aside every published checkpoint newer than `step`, which training goes on from. Returns their names."""
        newer = [name for name in self._listing()["published"] if step_of(name) > step]
        problem = ""
        if self.world.first:
            problem = self._try(lambda: [self.place.set_aside(name, "superseded") for name in newer])
        problem = self._agree(problem)
        if problem:
            raise CheckpointError(f"newer checkpoints could not be set aside: {problem}")
        return newer

    def fault(self, name: str) -> str:
        """What is wrong with a checkpoint, by file name; empty where nothing is. Ranks share the hashing."""
        entries, found = manifest_entries(self.place, name)
        for entry in entries[self.world.rank :: self.world.size]:
            found = found or file_fault(self.place, name, entry)
        return self._agree(found)

    def require_room(self, flat: FlatState) -> None:
        """Raise CheckpointError, before hours are spent, where the disk cannot take what is to be kept, or is no
        disk that all ranks share."""
        mine = sum(tensor.nbytes for piece in flat.share() for tensor in piece.tensors.values())
        self._bytes = sum(int(text) for text in self.world.gather_text(str(mine)))
        token = self.world.gather_text(secrets.token_hex(4))[0]
        problem = self._agree(self._try(lambda: self._probe(token)) if self.world.first else "")
        if not problem and not self.place.sees_probe(token, APPEARS_WITHIN_S):
            problem = f"rank {self.world.rank} does not see {self.place.url}: it must be a place all nodes share"
        problem = self._agree(problem)
        if self.world.first:
            self.place.remove_probe(token)
        if problem:
            raise CheckpointError(f"{self.place.url}: {problem}")

    def _write(
        self, name: str, flat: FlatState, state: dict[str, Any], metadata: dict[str, str], ephemeral: bool
    ) -> str:
        """Every rank its file, then the first rank the rest. Returns what went wrong, on every rank."""
        written: list[dict[str, Any]] = []
        file = RANK_FILE.format(self.world.rank)
        path = self.place.workspace(name) / file

        def write_mine() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)  # the staging folder of another node
            write_rank_file(path, flat, metadata)
            sync_file(path)
            written.append(rank_entry(path))
            self.place.deliver(name, file)

        def publish() -> None:
            workspace = self.place.workspace(name)
            write_file(workspace / INDEX, index_of(entries))
            write_json(workspace / STATE, state)
            for beside in (INDEX, STATE):
                self.place.deliver(name, beside)
            files = [*entries, *(fingerprint(workspace / beside) for beside in (INDEX, STATE))]
            self.place.publish(name, {"files": files, "ephemeral": ephemeral})

        problem = self._agree(self._try(write_mine))
        entries = [entry for text in self.world.gather_text(json.dumps(written)) for entry in json.loads(text)]
        if not problem and self.world.first:
            problem = self._try(publish)
        return self._agree(problem)

    def _listing(self) -> dict[str, Any]:
        """What the first rank finds, on every rank."""
        problem, listing = "", {}

        def look() -> None:
            listing.update(self.place.listing()._asdict())

        if self.world.first:
            problem = self._try(look)
        problem = self._agree(problem)
        if problem:
            raise CheckpointError(f"{self.place.url} cannot be read: {problem}")
        shared: dict[str, Any] = json.loads(self.world.gather_text(json.dumps(listing))[0])
        return shared

    def _make_place(self, name: str) -> None:
        """An empty folder to write into, room for it, and broken checkpoints out of the way."""
        for broken in self._broken:
            self.place.set_aside(broken, "broken")
        self._broken = []
        self.place.prepare(name, self._bytes)

    def _delete_old(self, update: int) -> None:
        """Delete what retention does not keep now that `update` is published, and what was cut short."""
        listing = self.place.listing()
        published = [(step_of(name), self._ephemeral(name)) for name in listing.published]
        gone = doomed(published, update, self.keep, self.keep_every)
        for step in gone:
            self.place.delete(name_of(step))
        oldest = min(step for step, _ in published if step not in gone)
        for name in [*listing.unfinished, *(name for name in listing.broken if step_of(name) < oldest)]:
            self.place.delete(name)

    def _ephemeral(self, name: str) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads(self.place.read(f"{name}/{MANIFEST}"))["ephemeral"])
        return False

    def _probe(self, token: str) -> None:
        """Write a probe, and compare what is free with what checkpoints will take."""
        self.place.probe(token)
        coming = max(1, self.keep + 1 - len(self.place.listing().published)) if self.place.on_disk else 1
        free, wanted = self.place.free(), coming * self._bytes
        if free < wanted:
            raise OSError(
                f"{self.place.staging} has {show_bytes(free)} free, the checkpoints to come take "
                f"{show_bytes(wanted)} ({show_bytes(self._bytes)} each): make room, lower checkpoint.keep "
                f"({self.keep}), or use another run.dir"
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


def open_checkpoint(folder: Place | Path | str, name: str | None = None) -> Checkpoint:
    """Open a checkpoint folder, or the one called `name` in a place, without hashing it.

    Raises CheckpointError where it is not one.
    """
    if name is None:
        url, _, name = str(folder).rstrip("/").rpartition("/")
        folder = url or "."
    place = folder if isinstance(folder, Place) else Place(folder)
    where = place.where(name)
    entries, fault = manifest_entries(place, name)
    if fault:
        raise CheckpointError(f"{where}: {fault}")
    try:
        state = json.loads(place.read(f"{name}/{STATE}"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: {STATE} is not readable: {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{where} has format {state.get('format')}, this version reads {FORMAT}")
    return Checkpoint(where, state, _reader(place, name, entries))


def _reader(place: Place, name: str, entries: Sequence[dict[str, Any]]) -> FlatReader:
    """The reader of a checkpoint's tensors, by its index where it has one."""
    ranks = [entry for entry in entries if _is_rank_file(entry)]
    files = [f"{name}/{entry['file']}" for entry in ranks]
    begins = [entry["header"] for entry in ranks if isinstance(entry.get("header"), int)]
    if len(begins) < len(ranks) or not any(entry["file"] == INDEX for entry in entries):
        return FlatReader(place, files)
    try:
        content = place.read(f"{name}/{INDEX}")
        reader = FlatReader(place, files, read_index(content, len(files)), begins)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place.where(name)}: {INDEX} is not readable: {error}") from None
    reader.opened, reader.header_bytes = 1, len(content)
    return reader


def manifest_entries(place: Place, name: str) -> tuple[list[dict[str, Any]], str]:
    """The manifest's entries, or what is wrong with it."""
    try:
        entries = json.loads(place.read(f"{name}/{MANIFEST}"))["files"]
        files = [(Path(entry["file"]).name, int(entry["bytes"]), str(entry["xxh3_128"])) for entry in entries]
    except FileNotFoundError:
        return [], f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], f"{MANIFEST} is not readable: {type(error).__name__}: {error}"
    if STATE not in [name for name, _, _ in files] or not any(map(_is_rank_file, entries)):
        return [], f"{MANIFEST} does not list {STATE} and the ranks' files"
    return entries, ""


def _is_rank_file(entry: dict[str, Any]) -> bool:
    return str(entry["file"]).startswith("rank_")


def file_fault(place: Place, name: str, entry: dict[str, Any]) -> str:
    """What is wrong with the file of a manifest's entry, by its name; empty where nothing is."""
    file = entry["file"]
    try:
        size = place.size(f"{name}/{file}")
        if size != entry["bytes"]:
            return f"{file} has {size} bytes, the manifest says {entry['bytes']}"
        digest = xxhash.xxh3_128()
        for block in place.blocks(f"{name}/{file}"):
            digest.update(block)
        if digest.hexdigest() != entry["xxh3_128"]:
            return f"{file} is not what was written: its hash differs from the manifest"
        if _is_rank_file(entry):
            read_header(place, f"{name}/{file}")
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    except CheckpointError as error:
        return str(error)
    return ""


def rank_entry(path: Path) -> dict[str, Any]:
    """A rank file's entry in the manifest, which also says how long its header is, and what `index_of` takes out.

    Raises OSError where the disk does not give back what was written.
    """
    try:
        header = read_header(Place(path.parent), path.name)
    except CheckpointError as error:
        raise OSError(str(error)) from error
    return {**fingerprint(path), "header": header.begin, "pieces": packed(header.pieces)}


def index_of(entries: Sequence[dict[str, Any]]) -> bytes:
    """The content of `index.json`, from the ranks' entries in order; takes out of each what only this needs."""
    return index_bytes(layout_of(unpacked(entry.pop("pieces")) for entry in entries))


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"file": path.name, "bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
