"""How does a checkpoint move: to another store, or into another number of files?

Every tensor is cut anew into as many equal ranges as there are to be files. It is read and written in pieces, so the
memory needed is that of one piece. `state.json` is copied as it is. The generators of a rank stay with the file of its
number; those of ranks beyond the new number are left behind, and such a rank starts fresh ones.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.files import PIECE, write_file, write_safetensors
from llmtrain.checkpoint.flat import EMA, RANK_FILE, FlatReader
from llmtrain.checkpoint.index import INDEX
from llmtrain.checkpoint.inspect import locate
from llmtrain.checkpoint.places import STATE, Place, step_of
from llmtrain.checkpoint.store import CheckpointStore, fingerprint, index_of, rank_entry
from llmtrain.distributed import World
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT
from llmtrain.errors import CheckpointError

_KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ, EMA)


def convert(named: str, destination: str, ranks: int, on_written: Callable[[int, int], None]) -> str:
    """Publish the checkpoint `named` (RUN@STEP, a folder or URL) again in `destination`, a folder or any fsspec URL,
    in `ranks` files. Returns where it is. `on_written(done, total)` hears of the bytes.

    Raises CheckpointError where it is not whole, where there is one of its name already, or no room.
    """
    folder, name = locate(named)
    source = CheckpointStore(folder, World(0, 1, 0, torch.device("cpu")), keep=2)
    found = source.require(step_of(name))
    with tempfile.TemporaryDirectory(prefix="llmtrain-convert-") as staging:
        place = Place(destination, Path(staging))
        try:
            if place.taken(name):
                raise CheckpointError(f"{place.where(name)} is there already: nothing is overwritten")
            state = source.place.read(f"{name}/{STATE}")
            _publish(place, name, found.reader, state, ranks, on_written)
        except OSError as error:
            place.abandon(name)
            raise CheckpointError(f"{place.where(name)} cannot be written: {error}") from None
    return place.where(name)


def _publish(
    place: Place, name: str, reader: FlatReader, state: bytes, ranks: int, on_written: Callable[[int, int], None]
) -> None:
    total = 4 * sum(reader.numel(parameter, kind) for parameter in reader.names() for kind in _KINDS)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        on_written(done, total)

    place.prepare(name, total if place.on_disk else -(-total // ranks))
    entries = []
    for rank in range(ranks):
        path = place.workspace(name) / RANK_FILE.format(rank)
        _write(path, reader, rank, ranks, wrote)
        entries.append(_delivered(place, name, path, rank_entry(path)))
    for file, content in ((INDEX, index_of(entries)), (STATE, state)):
        path = place.workspace(name) / file
        write_file(path, content)
        entries.append(_delivered(place, name, path, fingerprint(path)))
    place.publish(name, {"files": entries, "ephemeral": False})
    if place.listing().published[0] == name:
        place.point_to(name)


def _write(path: Path, reader: FlatReader, rank: int, ranks: int, wrote: Callable[[int], None]) -> None:
    """One rank's file: of every tensor the equal part that is its own."""
    own = reader.metadata(rank)
    parts: dict[str, tuple[str, str, int, int]] = {}
    for name in sorted(reader.names()):
        for kind in _KINDS:
            numel = reader.numel(name, kind)
            start, stop = numel * rank // ranks, numel * (rank + 1) // ranks
            if start < stop:
                parts[f"{kind}/{name}/{start}"] = (name, kind, start, stop)

    def pieces(key: str) -> Iterator[Tensor]:
        name, kind, start, stop = parts[key]
        for at in range(start, stop, PIECE):
            piece = reader.read(name, kind, at, min(stop, at + PIECE))
            yield piece
            wrote(piece.nbytes)

    shapes: dict[str, tuple[int, ...]] = {key: (stop - start,) for key, (_, _, start, stop) in parts.items()}
    write_safetensors(path, torch.float32, shapes, pieces, own)


def _delivered(place: Place, name: str, path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Bring a written file to the store, where it no longer takes room here. Returns its entry in the manifest."""
    place.deliver(name, path.name)
    if not place.on_disk:
        path.unlink()
    return entry
