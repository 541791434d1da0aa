"""The index of a checkpoint says what its files' headers say, in no more room for more ranks."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.checkpoint.flat import read_header
from llmtrain.checkpoint.index import INDEX, Layout, index_bytes, layout_of, packed, read_index, unpacked
from llmtrain.checkpoint.places import MANIFEST, Place
from llmtrain.checkpoint.store import CheckpointStore, open_checkpoint
from llmtrain.data.dataset import open_unchecked
from llmtrain.distributed import World, open_world
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT
from llmtrain.errors import CheckpointError, DataError
from llmtrain.train.feed import check_together
from tests import ranks
from tests.benchmarks import opens
from tests.test_checkpoint import flat
from tests.test_data_shards import write_folder

KEYS = (("weight", "a"), ("weight", "b.c"), ("exp_avg", "a"))


@st.composite
def files_of_pieces(draw):
    """What some files hold: of each tensor ranges that meet, in files in turn or anyhow."""
    count = draw(st.integers(1, 6))
    files = [{} for _ in range(count)]
    for key in KEYS:
        start = draw(st.integers(0, 3))
        first, steady, length = draw(st.integers(0, count - 1)), draw(st.booleans()), draw(st.integers(1, 5))
        for turn in range(draw(st.integers(0, 8))):
            file = (first + turn) % count if steady else draw(st.integers(0, count - 1))
            size = length if draw(st.integers(0, 3)) else draw(st.integers(1, 5))
            files[file].setdefault(key, []).append((start, size, draw(st.sampled_from([0, 0, 8, 400]))))
            start += size
    return files


def pieces_of(layout: Layout) -> set[tuple]:
    """Every piece that a layout tells of."""
    return {
        (key, run.start + run.length * index, run.length, run.file + index, run.at)
        for key, runs in layout.items()
        for run in runs
        for index in range(run.pieces)
    }


@settings(deadline=None)
@given(files_of_pieces())
def test_the_index_tells_every_piece(files):
    """A range would be read from where another one lies, and training would go on from it."""
    told = {
        (key, start, length, file, at)
        for file, pieces in enumerate(files)
        for key, own in pieces.items()
        for start, length, at in own
    }
    layout = layout_of(unpacked(packed(pieces)) for pieces in files)
    again = read_index(index_bytes(layout), len(files))
    assert again == layout
    assert pieces_of(again) == told


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"format": 2, "tensors": {}}',
        b'{"format": 1}',
        b'{"format": 1, "tensors": {"weight": []}}',
        b'{"format": 1, "tensors": {"weight/a": [[0, 1, 1, 0]]}}',
        b'{"format": 1, "tensors": {"weight/a": [[0, 1, 3, 0, 0]]}}',
        b'{"format": 1, "tensors": {"weight/a": [[0, 0, 1, 0, 0]]}}',
        b'{"format": 1, "tensors": {"weight/a": [[-1, 1, 1, 0, 0]]}}',
    ],
)
def test_what_is_no_index_is_refused(content):
    """A damaged index would end in a traceback, or in memory for pieces that there are not."""
    with pytest.raises(ValueError, match=r"."):
        read_index(content, 2)


@pytest.mark.parametrize("layout", ["even", "flat"])
def test_a_start_costs_a_rank_the_same_however_many_have_saved(layout, tmp_path):
    """A thousand ranks would each open a thousand files, and parse a million entries, before they go on."""
    few, many = (opens.checkpoint_opens(tmp_path / str(count), count, 2, layout) for count in (4, 32))
    assert few["after"]["files"] == many["after"]["files"] == 4  # manifest, state, index, and its own file
    assert (few["before"]["files"], many["before"]["files"]) == (4, 32)
    assert many["after"]["bytes"] < 2 * few["after"]["bytes"]


def test_a_start_opens_no_more_files_of_a_larger_set(tmp_path, monkeypatch):
    """A start on a hundred billion tokens would open thousands of files in every rank."""
    monkeypatch.setattr(opens, "HEADERS", 10)
    found = [opens.shard_opens(tmp_path / str(count), count, 1) for count in (20, 200)]
    assert [one["after"] for one in found] == [10, 10]
    assert [one["sizes_compared"] for one in found] == [20, 200]
    shared = [opens.shard_opens(tmp_path / f"by{ranks}", 24, ranks)["after"] for ranks in (4, 8)]
    assert shared == [6, 3]


def test_a_checkpoint_without_an_index_is_read_the_same(tmp_path):
    """A run that an earlier version saved could not go on."""
    opens.write_checkpoint(tmp_path, 3, 1, "flat")
    folder = tmp_path / opens.NAME
    by_index = open_checkpoint(folder).reader
    manifest = json.loads((folder / MANIFEST).read_text())
    entries = [entry for entry in manifest["files"] if entry["file"] != INDEX]
    for entry in entries:
        entry.pop("header", None)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "files": entries}))
    (folder / INDEX).unlink()
    found, rejected = CheckpointStore(tmp_path, World(0, 1, 0, torch.device("cpu")), 2).newest_valid()
    assert found is not None
    assert rejected == []
    assert (by_index.opened, found.reader.opened) == (1, 3)
    assert found.reader.names() == by_index.names()
    for name in by_index.names():
        for kind in (WEIGHT, EXP_AVG, EXP_AVG_SQ):
            numel = by_index.numel(name, kind)
            assert numel == found.reader.numel(name, kind) > 0
            whole = [reader.read(name, kind, 0, numel) for reader in (by_index, found.reader)]
            assert torch.equal(*whole)
    assert [found.reader.metadata(rank) for rank in (2, 3)] == [by_index.metadata(rank) for rank in (2, 3)]
    assert by_index.metadata(3) == {}


def test_an_index_that_is_missing_or_damaged_is_named(tmp_path):
    """A user would not learn which file to bring back."""
    opens.write_checkpoint(tmp_path, 2, 1, "even")
    folder = tmp_path / opens.NAME
    (folder / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match=r"step_00000001: index.json is not readable"):
        open_checkpoint(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000001: index.json is not readable"):
        open_checkpoint(folder)
    found, rejected = CheckpointStore(tmp_path, World(0, 1, 0, torch.device("cpu")), 2).newest_valid()
    assert found is None
    assert "index.json is missing" in rejected[0]


def test_what_a_save_indexes_is_what_its_files_say(tmp_path):
    """An index of ranks that save together would name another rank's file."""
    store = CheckpointStore(tmp_path, World(0, 1, 0, torch.device("cpu")), 2)
    assert store.save(flat(5), {"step": 5}) is None
    folder = tmp_path / "step_00000005"
    headers = [read_header(Place(folder), path.name).pieces for path in sorted(folder.glob("rank_*"))]
    assert read_index((folder / INDEX).read_bytes(), len(headers)) == layout_of(headers)


def looks(folder: str) -> None:
    """A rank that checks its share of a folder, and prints what it hears."""
    with open_world(60, collectives=True) as world:
        try:
            print("LOOKED", check_together(open_unchecked(folder, "llmtrain prepare"), world))
        except DataError as error:
            print("REFUSED", error)
        world.barrier()


def test_what_one_rank_finds_missing_all_ranks_hear(tmp_path):
    """The others would train on, or wait for the one that left."""
    write_folder(tmp_path / "d", [np.arange(3, 9)] * 4, np.arange(5))
    text = ranks.start(tmp_path / "whole", 2, looks, str(tmp_path / "d")).succeeded().text()
    assert sorted(line for line in text.splitlines() if line.startswith("LOOKED")) == ["LOOKED 2", "LOOKED 3"]
    (tmp_path / "d/train-000001.bin").unlink()
    text = ranks.start(tmp_path / "short", 2, looks, str(tmp_path / "d")).succeeded().text()
    assert text.count("REFUSED cannot read token file") == 2
    assert text.count("train-000001.bin: No such file or directory. Copy the folder again") == 2
