"""Which of a checkpoint's files holds which elements of which tensor?

Each rank file says so of itself, and at a thousand ranks a reader would open a thousand files and parse a million
entries to find its own few. So the first rank writes `index.json` at a save. Equal shards follow one another: what
a tensor's pieces have in common is written once, as a run of pieces of one length, each in the next file, all at the
same byte of their file's data. For parameters that are cut evenly the index is as long for 1024 ranks as for 8; where a
flat buffer of all of them is cut (ZeRO-1 and 2) it has an entry or so for each rank and kind.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

INDEX = "index.json"
_FORMAT = 1

Key = tuple[str, str]  # kind and parameter


class Run(NamedTuple):
    """`pieces` ranges of `length` elements of a flattened tensor, without a gap from `start` on."""

    start: int
    length: int
    pieces: int
    file: int  # that holds the first piece; each next one lies in the next file
    at: int  # byte of each file's data where its piece lies

    @property
    def stop(self) -> int:
        return self.start + self.pieces * self.length


Layout = Mapping[Key, Sequence[Run]]  # runs by their start
Pieces = Mapping[Key, Sequence[tuple[int, int, int]]]  # of one file: start, elements, byte of the file's data


def layout_of(files: Iterable[Pieces]) -> Layout:
    """Where everything lies, from what each file holds, in the order of the files."""
    found: dict[Key, list[Run]] = {}
    for file, pieces in enumerate(files):
        for key, own in pieces.items():
            found.setdefault(key, []).extend(Run(start, length, 1, file, at) for start, length, at in own)
    return {key: _joined(sorted(runs)) for key, runs in found.items()}


def _joined(pieces: Sequence[Run]) -> list[Run]:
    """The fewest runs that say the same as these, each of one piece."""
    runs: list[Run] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        follows = last is not None and piece == Run(last.stop, last.length, 1, last.file + last.pieces, last.at)
        if last is not None and follows:
            runs[-1] = last._replace(pieces=last.pieces + 1)
        else:
            runs.append(piece)
    return runs


def index_bytes(layout: Layout) -> bytes:
    """The content of `index.json`."""
    tensors = {"/".join(key): runs for key, runs in layout.items()}
    return json.dumps({"format": _FORMAT, "tensors": tensors}, separators=(",", ":"), sort_keys=True).encode()


def read_index(content: bytes, files: int) -> Layout:
    """What `index_bytes` wrote of a checkpoint of so many files. Raises ValueError where it is not that."""
    try:
        value = json.loads(content)
        if value["format"] != _FORMAT:
            raise ValueError(f"its format is {value['format']}, this version reads {_FORMAT}")
        layout: dict[Key, list[Run]] = {}
        for joined, runs in value["tensors"].items():
            kind, name = joined.split("/")
            layout[kind, name] = [_checked(Run(*map(int, run)), files) for run in runs]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return layout


def _checked(run: Run, files: int) -> Run:
    if min(run.start, run.length - 1, run.pieces - 1, run.file, run.at) < 0 or run.file + run.pieces > files:
        raise ValueError(f"a run {list(run)} of {files} files")
    return run


def packed(pieces: Pieces) -> str:
    """What one file holds, as short text for another rank."""
    text = json.dumps({"/".join(key): own for key, own in pieces.items()}, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> Pieces:
    """What `packed` was given."""
    found = json.loads(zlib.decompress(base64.b64decode(text)))
    return {(kind, name): own for joined, own in found.items() for kind, name in [joined.split("/")]}
