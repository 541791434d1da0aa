"""How many files does a rank open at its start, and how much does it read to learn where things lie?

    python -m tests.benchmarks.opens --out tests/benchmarks/results/opens.json

A checkpoint is made as 8, 64 and 256 ranks save it: the tensors of a decoder of `--layers` layers, each cut evenly
(FSDP2, ZeRO-3) or the flat run of all of them (ZeRO-1, ZeRO-2), in tiny pieces. One rank then opens it and reads the
part it would have among as many ranks. Counted are the files it opens before it reads a tensor, the bytes of the index
or of the headers, and those of the manifest: `before` by the header of every rank's file, as for a checkpoint without
an index, `after` by its index. Of a data set of many shards are counted those that a rank opens: before each rank all
of them, after its share of them, and of these `HEADERS` at most.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from llmtrain.checkpoint.flat import RANK_FILE, FlatReader, write_rank_file
from llmtrain.checkpoint.places import MANIFEST, STATE, Place
from llmtrain.checkpoint.store import fingerprint, index_of, open_checkpoint, rank_entry
from llmtrain.data import shards
from llmtrain.data.dataset import HEADERS
from llmtrain.data.shards import TokenFile, check_shard, token_dtype, write_shard
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT, FlatState, Slice

NAME = "step_00000001"
KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)
TOKENIZER = "00" * 32


def shapes(layers: int, ranks: int) -> dict[str, int]:
    """Elements of every tensor: a piece of one or more for each rank, and one that some ranks hold nothing of."""
    block = {"wq": 4, "wk": 2, "wv": 2, "wo": 4, "w_gate": 6, "w_up": 6, "w_down": 6, "norm_a": 1, "norm_b": 1}
    sizes = {f"blocks.{layer}.{name}.weight": ranks * many for layer in range(layers) for name, many in block.items()}
    return {"embed.weight": ranks * 5 - 3 * ranks // 4, **sizes, "norm.weight": ranks, "head.weight": ranks * 5}


def cuts(sizes: dict[str, int], rank: int, ranks: int, layout: str) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of what a rank holds."""
    total = sum(sizes.values())
    mine = range(total * rank // ranks, total * (rank + 1) // ranks)
    begin = 0
    for name, numel in sizes.items():
        if layout == "even":
            each = -(-numel // ranks)
            start, stop = min(numel, rank * each), min(numel, (rank + 1) * each)
        else:
            start, stop = (min(max(edge - begin, 0), numel) for edge in (mine.start, mine.stop))
        begin += numel
        if start < stop:
            yield name, start, stop


def write_checkpoint(folder: Path, ranks: int, layers: int, layout: str) -> None:
    """A checkpoint `NAME` as so many ranks publish it: element i of a tensor is i."""
    place = Place(folder)
    place.prepare(NAME, 0)
    workspace = place.workspace(NAME)
    sizes = shapes(layers, ranks)
    entries = []
    for rank in range(ranks):
        slices = [
            Slice(name, start, stop, sizes[name], {kind: torch.arange(start, stop).float() for kind in KINDS})
            for name, start, stop in cuts(sizes, rank, ranks, layout)
        ]
        path = workspace / RANK_FILE.format(rank)
        write_rank_file(path, FlatState(slices, 1), {"rng": "0" * 5000})
        entries.append(rank_entry(path))
    (workspace / "index.json").write_bytes(index_of(entries))
    (workspace / STATE).write_text('{"format": 1, "step": 1}')
    beside = [fingerprint(workspace / name) for name in ("index.json", STATE)]
    place.publish(NAME, {"files": [*entries, *beside], "ephemeral": False})


@contextmanager
def counted() -> Iterator[set[str]]:
    """The files that a `Place` reads inside the block."""
    opened: set[str] = set()
    real = Place.read

    def read(place: Place, file: str, start: int | None = None, stop: int | None = None) -> bytes:
        opened.add(file)
        return real(place, file, start, stop)

    with patch.object(Place, "read", read):
        yield opened


def checkpoint_opens(folder: Path, ranks: int, layers: int, layout: str) -> dict[str, Any]:
    """What the last of so many ranks reads of a checkpoint that as many have saved, and whether it reads it right."""
    write_checkpoint(folder, ranks, layers, layout)
    sizes = shapes(layers, ranks)
    counts: dict[str, Any] = {"ranks": ranks, "layout": layout}
    rank_files = [f"{NAME}/{RANK_FILE.format(rank)}" for rank in range(ranks)]
    for when in ("before", "after"):
        with counted() as opened:
            if when == "after":
                reader = open_checkpoint(folder, NAME).reader
            else:
                reader = FlatReader(Place(folder), rank_files)
            reader.metadata(ranks - 1)
        counts[when] = {"files": len(opened), "bytes": reader.header_bytes}
        for name, start, stop in cuts(sizes, ranks - 1, ranks, layout):
            for kind in KINDS:
                assert torch.equal(reader.read(name, kind, start, stop), torch.arange(start, stop).float()), name
    counts["pieces"] = sum(1 for rank in range(ranks) for _ in cuts(sizes, rank, ranks, layout)) * len(KINDS)
    counts["manifest_bytes"] = (folder / NAME / MANIFEST).stat().st_size
    return counts


def shard_opens(folder: Path, count: int, ranks: int) -> dict[str, Any]:
    """Token files that the last of so many ranks opens before it reads a token of a set of `count` shards."""
    folder.mkdir()
    one = write_shard(folder / "0.bin", [np.arange(8)], vocab_size=10, tokenizer_hash=TOKENIZER)
    for index in range(1, count):
        (folder / f"{index}.bin").hardlink_to(folder / "0.bin")
    opened = 0

    def check(path: Path, shard: shards.Shard) -> None:
        nonlocal opened
        opened += 1
        check_shard(path, shard, vocab_size=10, tokenizer_hash=TOKENIZER, remedy="")

    split = TokenFile(
        folder, [one.model_copy(update={"file": f"{index}.bin"}) for index in range(count)], token_dtype(10), check
    )
    looked = split.check(ranks - 1, ranks, HEADERS)
    return {"shards": count, "ranks": ranks, "before": count, "after": opened, "sizes_compared": looked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 6700, 20000])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python -m tests.benchmarks.opens",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "layers": asked.layers,
        "checkpoints": [],
        "data": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("even", "flat"):
            for ranks in asked.ranks:
                result["checkpoints"].append(
                    checkpoint_opens(Path(folder) / f"{layout}{ranks}", ranks, asked.layers, layout)
                )
        for count in asked.shards:
            for ranks in (1, *asked.ranks):
                result["data"].append(shard_opens(Path(folder) / f"{count}_{ranks}", count, ranks))
    lines = ",\n".join(f'"{key}": {_rows(value)}' for key, value in result.items())
    print(f"{{\n{lines}\n}}")
    if asked.out is not None:
        asked.out.write_text(f"{{\n{lines}\n}}\n")


def _rows(value: Any) -> str:
    """JSON, a row of a table on a line."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n " + ",\n ".join(json.dumps(row) for row in value) + "\n]"


if __name__ == "__main__":
    main()
