"""How does flat state lie on disk?

Each rank writes one safetensors file, `rank_00000.safetensors`, with the slices it owns: 1-D fp32 tensors named
`kind/parameter/start`, for example `exp_avg/blocks.0.attention.wq.weight/524288`. A file says by itself what it holds,
so any engine on any number of ranks reads just the ranges it needs, by memory map; nothing is gathered or unpickled.
Format: https://huggingface.co/docs/safetensors.
"""

import json
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.engines.base import FlatState
from llmtrain.errors import CheckpointError

RANK_FILE = "rank_{:05d}.safetensors"


def write_rank_file(path: Path, state: FlatState) -> None:
    """Write the slices this rank owns. Raises OSError where the disk refuses."""
    tensors = {}
    for piece in state.slices:
        for kind, tensor in piece.tensors.items():
            if tensor.dtype != torch.float32:
                raise CheckpointError(f"{kind} of {piece.name} is {tensor.dtype}: state below fp32 cannot be resumed")
            if tensor.numel():
                tensors[f"{kind}/{piece.name}/{piece.start}"] = tensor.detach().cpu().contiguous()
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


class _Piece(NamedTuple):
    start: int
    stop: int
    file: int
    key: str


class FlatReader:
    """Reads any range of any flattened tensor from the rank files of one checkpoint."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._open: dict[int, Any] = {}
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        for index, path in enumerate(files):
            for (kind, name, start), count in read_header(path).items():
                piece = _Piece(start, start + count, index, f"{kind}/{name}/{start}")
                self._pieces.setdefault((kind, name), []).append(piece)
        for pieces in self._pieces.values():
            pieces.sort()

    def names(self) -> set[str]:
        """The parameters the checkpoint holds."""
        return {name for _, name in self._pieces}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), 1-D fp32. Raises CheckpointError where the files do not hold them all."""
        out = torch.empty(stop - start)
        pieces = self._pieces.get((kind, name), [])
        at = start
        index = max(0, bisect_right(pieces, start, key=lambda piece: piece.start) - 1)
        while at < stop:
            if index >= len(pieces) or not pieces[index].start <= at < pieces[index].stop:
                raise CheckpointError(
                    f"{self.files[0].parent} does not hold elements {at} to {stop} of {kind} of {name}: "
                    "it was saved from another model, or files are missing"
                )
            piece = pieces[index]
            end = min(stop, piece.stop)
            out[at - start : end - start] = self._handle(piece.file).get_slice(piece.key)[
                at - piece.start : end - piece.start
            ]
            at, index = end, index + 1
        return out

    def _handle(self, file: int) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.files[file], framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.files[file]} is not a readable rank file: {error}") from None
        return self._open[file]


def read_header(path: Path) -> dict[tuple[str, str, int], int]:
    """Kind, parameter and start of every slice in a rank file, and its length, without reading a slice.

    Raises CheckpointError where the file is no rank file, or holds anything but fp32: moments below that are lost.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        slices = {}
        for key, entry in header.items():
            if key != "__metadata__":
                kind, name, start = key.split("/")
                slices[kind, name, int(start)] = int(entry["shape"][0])
                if entry["dtype"] != "F32":
                    raise CheckpointError(
                        f"{path.name} holds {kind} of {name} as {entry['dtype']}: state below fp32 cannot be resumed"
                    )
    except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable rank file: {error}") from None
    return slices
