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

from llmtrain.checkpoint.index import Key, Layout, layout_of
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


class Header(NamedTuple):
    """What a rank file holds."""

    pieces: dict[Key, list[tuple[int, int, int]]]  # start, elements, and the byte of the file's data where they lie
    metadata: dict[str, str]
    begin: int  # byte of the file where its data begins: as long is what says what the file holds


class FlatReader:
    """Reads any range of any flattened tensor from the rank files of one checkpoint.

    With `layout` and `begins`, the byte where the data of each file begins, no file is opened before something of it is
    read. Without, as for a checkpoint that has no index, every file is asked what it holds. `opened` and
    `header_bytes` count what was read to know where things lie: files, and their bytes.
    """

    def __init__(
        self, place: Place, files: Sequence[str], layout: Layout | None = None, begins: Sequence[int] = ()
    ) -> None:
        self.place = place
        self.files = files
        self.opened = self.header_bytes = 0
        self._metadata: dict[int, dict[str, str]] = {}  # of each rank that was asked for
        if layout is None:
            headers = [self._header(rank) for rank in range(len(files))]
            layout, begins = layout_of([header.pieces for header in headers]), [header.begin for header in headers]
        self._layout, self._begins = layout, begins

    def names(self) -> set[str]:
        """The parameters the checkpoint holds."""
        return {name for _, name in self._layout}

    def numel(self, name: str, kind: str) -> int:
        """Elements of one flattened tensor; 0 where the checkpoint does not hold it."""
        return max((run.stop for run in self._layout.get((kind, name), [])), default=0)

    def metadata(self, rank: int) -> dict[str, str]:
        """What a rank wrote beside its slices; nothing for a rank that there was not."""
        if rank not in self._metadata and rank < len(self.files):
            self._header(rank)
        return self._metadata.get(rank, {})

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), 1-D fp32. Raises CheckpointError where the files do not hold them all."""
        out = np.empty(stop - start, np.float32)
        runs = self._layout.get((kind, name), [])
        at = start
        while at < stop:
            index = bisect_right(runs, at, key=lambda run: run.start) - 1
            if index < 0 or at >= runs[index].stop:
                raise CheckpointError(
                    f"{self.place.url}/{Path(self.files[0]).parent} does not hold elements {at} to {stop} of {kind} of "
                    f"{name}: it was saved from another model, or files are missing"
                )
            run = runs[index]
            piece, within = divmod(at - run.start, run.length)
            end = min(stop, at - within + run.length)
            file = run.file + piece
            first = self._begins[file] + run.at + 4 * within
            try:
                data = self.place.read(self.files[file], first, first + 4 * (end - at))
                out[at - start : end - start] = np.frombuffer(data, "<f4")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.place.where(self.files[file])} cannot be read: {error}") from None
            at = end
        return torch.from_numpy(out)

    def _header(self, rank: int) -> Header:
        header = read_header(self.place, self.files[rank])
        self.opened += 1
        self.header_bytes += header.begin
        self._metadata[rank] = header.metadata
        return header


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
        pieces: dict[Key, list[tuple[int, int, int]]] = {}
        for key, entry in entries.items():
            kind, name, start = key.split("/")
            if entry["dtype"] != "F32":
                raise CheckpointError(
                    f"{Path(file).name} holds {kind} of {name} as {entry['dtype']}: state below fp32 cannot be resumed"
                )
            piece = int(start), int(entry["shape"][0]), int(entry["data_offsets"][0])
            pieces.setdefault((kind, name), []).append(piece)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{place.where(file)} is not a readable rank file: {error}") from None
    return Header(pieces, metadata, 8 + length)
