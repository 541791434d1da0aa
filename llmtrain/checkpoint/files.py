"""How is a folder of weights written that may be larger than memory, and never seen half done?

A safetensors file begins with a header that says where each tensor lies, so the tensors can follow one after another,
piece by piece: memory holds one piece, whatever the size of the file or of a tensor. The folder is filled under another
name, synced to disk, and takes its own name by one rename.
Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from llmtrain.checkpoint.places import sync_file
from llmtrain.errors import CheckpointError
from llmtrain.units import show_bytes

PIECE = 1 << 22  # elements held at once

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}

Pieces = Callable[[str], Iterable[Tensor]]


def write_safetensors(
    path: Path,
    dtype: torch.dtype,
    shapes: dict[str, tuple[int, ...]],
    pieces: Pieces,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors of `shapes`, in that order. `pieces(name)` gives one tensor's elements, a piece after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for piece in pieces(name):
                file.write(piece.to(dtype).contiguous().view(torch.uint8).numpy().data)
        assert file.tell() == 8 + len(text) + end, f"{path}: the pieces are not what the header says"
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs, and sync it to disk."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a small file, and sync it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def require_empty(folder: Path) -> None:
    """Raise CheckpointError where `folder` is something already, other than an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty: nothing is overwritten, name a new folder")


@contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """A folder to fill with `size` bytes, which becomes `folder` when the block ends well; else nothing is left of it.

    Raises CheckpointError where `folder` holds something, or where the disk refuses or is too small.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        require_empty(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < size:
            raise CheckpointError(f"{folder} takes {show_bytes(size)}, its disk has {show_bytes(free)} free")
        yield temporary
        sync_file(temporary)
        temporary.rename(folder)
        sync_file(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def progress_bar() -> Progress:
    """Bytes done, speed and time left, on a terminal; nothing in a log."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
