"""How does flat state lie on disk?

Each rank writes one safetensors file, `rank_00000.safetensors`, with the slices it owns, or its share of those that
other ranks hold as well: 1-D fp32 tensors named
`kind/parameter/start`, for example `exp_avg/blocks.0.attention.wq.weight/524288`. What belongs to the rank alone, the
state of its random generators, is text in the file's metadata. A file says by itself what it holds, so any engine on
any number of ranks reads just the ranges it needs; nothing is gathered or unpickled.
Format: https://huggingface.co/docs/safetensors.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.checkpoint.places import Place
from llmtrain.engines.base import FlatState
from llmtrain.errors import CheckpointError

RANK_FILE = "rank_{:05d}.safetensors"
EMA = "ema"  # a kind of tensor beside those of the engines: `llmtrain.train.average`


def write_rank_file(path: Path, state: FlatState, metadata: dict[str, str] | None = None) -> None:
    """Write this rank's share of the state. Raises OSError where the disk refuses."""
    tensors = {}
    for piece in state.share():
        for kind, tensor in piece.tensors.items():
            if tensor.dtype != torch.float32:
                raise CheckpointError(f"{kind} of {piece.name} is {tensor.dtype}: state below fp32 cannot be resumed")
            if tensor.numel():
                tensors[f"{kind}/{piece.name}/{piece.start}"] = tensor.detach().cpu().contiguous()
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


class _Piece(NamedTuple):
    start: int
    stop: int
    file: str
    at: int  # byte of the file where its first element lies


class Header(NamedTuple):
    """What a rank file holds."""

    pieces: dict[tuple[str, str], list[_Piece]]  # by kind and parameter
    metadata: dict[str, str]


class FlatReader:
    """Reads any range of any flattened tensor from the rank files of one checkpoint."""

    def __init__(self, place: Place, files: Sequence[str]) -> None:
        self.place = place
        self.files = files
        self.metadata: list[dict[str, str]] = []  # of every rank
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        for file in files:
            header = read_header(place, file)
            self.metadata.append(header.metadata)
            for key, pieces in header.pieces.items():
                self._pieces.setdefault(key, []).extend(pieces)
        for pieces in self._pieces.values():
            pieces.sort()

    def names(self) -> set[str]:
        """The parameters the checkpoint holds."""
        return {name for _, name in self._pieces}

    def numel(self, name: str, kind: str) -> int:
        """Elements of one flattened tensor; 0 where the checkpoint does not hold it."""
        return max((piece.stop for piece in self._pieces.get((kind, name), [])), default=0)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), 1-D fp32. Raises CheckpointError where the files do not hold them all."""
        out = np.empty(stop - start, np.float32)
        pieces = self._pieces.get((kind, name), [])
        at = start
        index = max(0, bisect_right(pieces, start, key=lambda piece: piece.start) - 1)
        while at < stop:
            if index >= len(pieces) or not pieces[index].start <= at < pieces[index].stop:
                raise CheckpointError(
                    f"{self.place.url}/{Path(self.files[0]).parent} does not hold elements {at} to {stop} of {kind} of "
                    f"{name}: it was saved from another model, or files are missing"
                )
            piece = pieces[index]
            end = min(stop, piece.stop)
            first = piece.at + 4 * (at - piece.start)
            try:
                data = self.place.read(piece.file, first, first + 4 * (end - at))
                out[at - start : end - start] = np.frombuffer(data, "<f4")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.place.where(piece.file)} cannot be read: {error}") from None
            at, index = end, index + 1
        return torch.from_numpy(out)


def read_header(place: Place, file: str) -> Header:
    """What a rank file holds, without reading a slice.

    Raises CheckpointError where it is no rank file, or holds anything but fp32: moments below that are lost.
    """
    try:
        length = int.from_bytes(place.read(file, 0, 8), "little")
        if length > place.size(file):
            raise ValueError("its header is longer than the file")
        entries = json.loads(place.read(file, 8, 8 + length))
        metadata = entries.pop("__metadata__", {})
        pieces: dict[tuple[str, str], list[_Piece]] = {}
        for key, entry in entries.items():
            kind, name, start = key.split("/")
            if entry["dtype"] != "F32":
                raise CheckpointError(
                    f"{Path(file).name} holds {kind} of {name} as {entry['dtype']}: state below fp32 cannot be resumed"
                )
            stop = int(start) + int(entry["shape"][0])
            piece = _Piece(int(start), stop, file, 8 + length + int(entry["data_offsets"][0]))
            pieces.setdefault((kind, name), []).append(piece)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{place.where(file)} is not a readable rank file: {error}") from None
    return Header(pieces, metadata)
