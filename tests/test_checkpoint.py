"""A checkpoint is whole or it is not used; what it holds is exact on every layout; nothing good is ever lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.checkpoint.flat import FlatReader, write_rank_file
from llmtrain.checkpoint.places import Place
from llmtrain.checkpoint.store import CheckpointStore, open_checkpoint
from llmtrain.cli import main
from llmtrain.distributed import World, open_world
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT, Engine, FlatState, Slice
from llmtrain.errors import CheckpointError
from llmtrain.train.metrics import read_metrics
from tests import ranks
from tests.test_resume import ENGINES, history, weights
from tests.test_train import command, seal, train_here

Leg = Callable[..., ranks.Ranks]
Captured = pytest.CaptureFixture[str]

ALONE = World(0, 1, 0, torch.device("cpu"))
KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)


def flat(update: int) -> FlatState:
    """A state of two parameters that is another one after every update."""
    slices = []
    for name, count in (("a.weight", 1000), ("b.weight", 7)):
        tensors = {kind: torch.arange(float(count)) + update + index / 2 for index, kind in enumerate(KINDS)}
        slices.append(Slice(name, 0, count, count, tensors))
    return FlatState(slices, update)


def saved(folder: Path, *updates: int, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(folder, ALONE, keep)
    for update in updates:
        assert store.save(flat(update), {"step": update}) is None
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    """Store the moments in 16 bits, with a manifest that agrees."""
    tensors = load_file(path)
    save_file({key: value.bfloat16() if key.startswith("exp") else value for key, value in tensors.items()}, path)
    seal(path.parent)


RANK_0 = "rank_00000.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated rank file": (RANK_0, truncate, "the manifest says"),
    "flipped bit": (RANK_0, flip, "its hash differs"),
    "missing rank file": (RANK_0, Path.unlink, "is missing"),
    "moments in bf16": (RANK_0, halve, "state below fp32"),
    "a folder for a file": (RANK_0, lambda path: (path.unlink(), path.mkdir()), "the manifest says"),
    "no manifest": ("manifest.json", Path.unlink, "is missing"),
    "empty manifest": ("manifest.json", lambda path: path.write_text(""), "is not readable"),
    "broken manifest": ("manifest.json", lambda path: path.write_text('{"files": [{"file": "'), "is not readable"),
    "another manifest": ("manifest.json", lambda path: path.write_text('{"files": [1, 2]}'), "is not readable"),
    "manifest of nothing": ("manifest.json", lambda path: path.write_text('{"files": []}'), "does not list"),
    "no state": ("state.json", Path.unlink, "is missing"),
    "changed state": ("state.json", flip, "its hash differs"),
    "no index": ("index.json", Path.unlink, "is missing"),
    "changed index": ("index.json", flip, "its hash differs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    """A damaged disk would end the run, or let it go on from garbage, and the log would not say from what."""
    name, harm, words = DAMAGES[damage]
    saved(tmp_path, 10, 20)
    harm(tmp_path / "step_00000020" / name)
    store = CheckpointStore(tmp_path, ALONE, 9)
    before = contents(tmp_path)
    found, rejected = store.newest_valid()
    assert found is not None
    assert (found.state["step"], contents(tmp_path)) == (10, before)
    (told,) = rejected
    assert told.startswith("step_00000020: ")
    assert name in told
    assert words in told
    assert torch.equal(found.reader.read("a.weight", EXP_AVG, 3, 9), torch.arange(3.0, 9) + 10.5)

    assert store.save(flat(20), {"step": 20}) is None
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000020", "step_00000020.broken"]
    found, rejected = CheckpointStore(tmp_path, ALONE, 9).newest_valid()
    assert found is not None
    assert (found.state["step"], rejected) == (20, [])


@pytest.mark.parametrize(
    ("latest", "told"),
    [
        ("step_00000010", ["is older"]),
        ("step_00000030", ["does not exist"]),
        ("", ["does not exist"]),
        (None, []),
        ("step_00000020", []),
    ],
)
def test_latest_is_not_trusted(tmp_path: Path, latest: str | None, told: list[str]) -> None:
    """A pointer that a kill left behind would cost the updates since, or the run."""
    saved(tmp_path, 10, 20)
    (tmp_path / "step_00000030.tmp").mkdir()
    if latest is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(latest)
    found, rejected = CheckpointStore(tmp_path, ALONE, 9).newest_valid()
    assert found is not None
    assert found.state["step"] == 20
    assert rejected[0] == "step_00000030.tmp: this save was cut short"
    assert [text.startswith("latest: ") and words in text for text, words in zip(rejected[1:], told, strict=True)] == [
        True for _ in told
    ]


def test_retention_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    """A rotation that counts broken or later leftovers would delete the only checkpoint one can go on from."""
    store = saved(tmp_path, 10, 20, 30, keep=2)
    assert names(tmp_path) == ["latest", "step_00000020", "step_00000030"]
    saved(tmp_path, 40, 50, keep=9)
    (tmp_path / "step_00000015.tmp").mkdir()
    for update in (30, 40, 50):
        flip(tmp_path / f"step_{update:08d}" / RANK_0)
    found, rejected = store.newest_valid()
    assert found is not None
    assert (found.state["step"], len(rejected)) == (20, 3)
    assert store.save(flat(25), {"step": 25}) is None
    broken = [f"step_{update:08d}.broken" for update in (30, 40, 50)]
    assert names(tmp_path) == ["latest", "step_00000020", "step_00000025", *broken]
    for update in (30, 35, 40):
        assert store.save(flat(update), {"step": update}) is None
    assert names(tmp_path) == ["latest", "step_00000035", "step_00000040", *broken[1:]]
    assert (tmp_path / "latest").read_text() == "step_00000040\n"


def test_many_broken_checkpoints_hide_none(tmp_path: Path) -> None:
    """A run with a long row of damaged checkpoints would not find the whole one behind it."""
    saved(tmp_path, *range(1, 41), keep=99)
    for update in range(2, 41):
        (tmp_path / f"step_{update:08d}" / "manifest.json").unlink()
    found, rejected = CheckpointStore(tmp_path, ALONE, 99).newest_valid()
    assert found is not None
    assert (found.state["step"], len(rejected)) == (1, 39)


def test_moments_below_fp32_are_not_saved(tmp_path: Path) -> None:
    """Small second moments would round to nothing, and the run would not be the same after a resume."""
    state = flat(10)
    low = state.slices[0]._replace(
        tensors={kind: tensor.bfloat16() for kind, tensor in state.slices[0].tensors.items()}
    )
    with pytest.raises(CheckpointError, match="below fp32"):
        write_rank_file(tmp_path / RANK_0, state._replace(slices=[low]))


def test_a_range_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    """A parameter would be filled with what happens to lie in memory."""
    saved(tmp_path, 10)
    reader = open_checkpoint(tmp_path / "step_00000010").reader
    assert reader.names() == {"a.weight", "b.weight"}
    for name, start, stop in (("a.weight", 990, 1001), ("c.weight", 0, 1)):
        with pytest.raises(CheckpointError, match=f"does not hold elements .* of exp_avg of {name}"):
            reader.read(name, EXP_AVG, start, stop)


def test_too_small_a_disk_is_told_before_the_first_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would fail at its first save, hours after the start."""
    store = CheckpointStore(tmp_path / "checkpoints", ALONE, 2)
    store.require_room(flat(0))
    assert names(tmp_path / "checkpoints") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 3 * 12 * 1007 - 1))
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep"):
        store.require_room(flat(0))
    saved(tmp_path / "checkpoints", 10)
    store.require_room(flat(10))


def apart(folder: Path) -> None:
    """Ask for room on one folder, and then on a folder of each rank."""
    from llmtrain.checkpoint import store

    store.APPEARS_WITHIN_S = 1.0
    with open_world(60, collectives=True) as world:
        CheckpointStore(folder, world, 2).require_room(flat(0))
        try:
            CheckpointStore(folder / str(world.rank), world, 2).require_room(flat(0))
        except CheckpointError as error:
            print(error)
        world.barrier()


def test_a_folder_that_nodes_do_not_share_is_told_before_the_first_update(tmp_path: Path) -> None:
    """Every node would write its part to its own disk, and no checkpoint would ever be whole."""
    running = ranks.start(tmp_path / "logs", 2, apart, tmp_path / "run").succeeded()
    assert running.text().count("rank 1 does not see") == 2
    assert not list((tmp_path / "run").rglob("probe*"))


def carry(words: list[str], target: Path) -> None:
    """One leg, which also saves what it has loaded to another folder before it trains."""
    from llmtrain.train import run

    real: Callable[..., Any] = run.begin

    def begin(engine: Engine, store: CheckpointStore, *arguments: Any) -> Any:
        start = real(engine, store, *arguments)
        assert CheckpointStore(target, store.world, 2).save(engine.state(), {}) is None
        return start

    run.begin = begin  # type: ignore[assignment]
    main(words)


def whole(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, put together from its ranks' files."""
    tensors: dict[str, dict[int, bytes]] = {}
    for path in checkpoint.glob("rank_*.safetensors"):
        for key, tensor in load_file(path).items():
            name, start = key.rsplit("/", 1)
            tensors.setdefault(name, {})[int(start)] = tensor.numpy().tobytes()
    return {name: b"".join(pieces[start] for start in sorted(pieces)) for name, pieces in tensors.items()}


LAYOUTS = [("fsdp", 2), ("zero3", 2), ("zero1", 3), ("single", 1)]
# Three ranks share 12 sequences. At the peak of 1e-2, update 15 turns a rounding of 1e-6 in the loss into one of 1e-4.
BATCH = ("batch.global_sequences=12", "batch.micro=2", "schedule.peak=3e-3")


def test_a_run_goes_on_from_any_layout_to_any_other(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user whose cluster changes would lose the run, or its moments, or a few elements at the seams of shards."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    train_here(prepared, straight, *BATCH)
    train_here(prepared, run, *BATCH, "checkpoint.keep=9", "run.stop_at=4 steps")
    for update, (engine, count) in zip((4, 8, 12, 16), LAYOUTS, strict=True):
        words = (*ENGINES[engine], *BATCH, "checkpoint.keep=9", f"run.stop_at={update + 4} steps")
        target = tmp_path / f"loaded_{engine}"
        leg = command(prepared, run, *words, resume="must")
        running = ranks.start(tmp_path / f"log_{engine}", count, carry, leg, target).succeeded()
        assert f"RESUMED run=small step={update}" in running.text()
        name = f"step_{update:08d}"
        loaded = whole(target / name)
        assert loaded == whole(run / "checkpoints" / name)
        assert {key.split("/")[0] for key in loaded} == set(KINDS)
    losses = [[json.loads(row)["loss"] for row in history(path)] for path in (run, straight)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=5e-6)
    assert len(losses[0]) == 20


def test_ranks_agree_on_what_is_damaged_and_end_as_if_nothing_was(leg: Leg, tmp_path: Path) -> None:
    """Each rank sees only its part of the damage; they would go on from different updates, or hang."""
    words = ("engine.kind=fsdp", "checkpoint.every=4 steps", "checkpoint.keep=9")
    leg("run", 2, *words).succeeded()
    run, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    final, rows = weights(run), history(run)
    flip(folder / "step_00000020/rank_00000.safetensors")
    truncate(folder / "step_00000016/rank_00001.safetensors")
    (folder / "step_00000012/state.json").unlink()
    (folder / "step_00000024.tmp").mkdir()
    again = leg("run", 2, *words).succeeded().text()
    assert "RESUMED run=small step=8" in again
    for told in (
        "step_00000020: rank_00000.safetensors is not what was written",
        "step_00000016: rank_00001.safetensors has",
        "step_00000012: state.json is missing",
        "step_00000024.tmp: this save was cut short",
    ):
        assert again.count(f"rejected {told}") == 1
    assert (weights(run), history(run)) == (final, rows)
    assert names(folder)[-1] == "step_00000020.broken"


def test_when_all_are_broken_nothing_is_overwritten(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A run of weeks would start over, on top of what could still be rescued."""
    run = tmp_path / "run"
    train_here(prepared, run, "checkpoint.every=10 steps")
    for path in (run / "checkpoints").glob("step_*"):
        flip(path / RANK_0)
    before = contents(run)
    for resume in ("auto", "must", "never"):
        with pytest.raises(CheckpointError) as refused:
            train_here(prepared, run, resume=resume)
        for update in (10, 20):
            assert f"step_{update:08d}: {RANK_0}" in str(refused.value)
    assert contents(run) == before
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match='latest: it names "step_00000020", which does not exist'):
        train_here(prepared, run)


def test_resume_does_what_it_is_told(prepared: dict[str, Any], tmp_path: Path, capsys: Captured) -> None:
    """A typing error in run.dir would start from scratch without a word, or go on with an old run."""
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"--resume must: .* holds no whole checkpoint"):
        train_here(prepared, run, resume="must")
    train_here(prepared, run, "run.stop_at=10 steps", resume="never")
    assert "FRESH START run=small" in capsys.readouterr().out
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"--resume never: .*step_00000010 is there"):
        train_here(prepared, run, resume="never")
    assert contents(run) == before
    train_here(prepared, run)
    assert "RESUMED run=small step=10 tokens=2560" in capsys.readouterr().out


def test_another_run_is_not_gone_on_with(prepared: dict[str, Any], tmp_path: Path) -> None:
    """Two experiments would be mixed in one folder, and neither could be trusted."""
    run = tmp_path / "run"
    train_here(prepared, run, "run.stop_at=2 steps")
    before = contents(run)
    changes = ("run.seed=8", "optim.weight_decay=0.2", "data.document_mask=true", "batch.global_sequences=16")
    fields = ("seed: there 7, in this config 8", "optim.weight_decay", "document_mask", "batch.sequences")
    with pytest.raises(CheckpointError) as refused:
        train_here(prepared, run, *changes)
    assert all(field in str(refused.value) for field in fields)
    assert str(refused.value).count("in this config") == len(fields)
    assert contents(run) == before

    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"(?s)belongs to another run:.*seed.*another run.dir"):
        train_here(prepared, run, "run.seed=8")
    train_here(prepared, run)
    assert len(history(run)) == 20


def killed_in_save(point: str, folder: Path) -> None:
    """Save update 10, then die at a point of saving update 20."""
    from llmtrain.checkpoint import store

    saved(folder, 10)

    def die(*arguments: Any, **more: Any) -> None:
        if point == "in the rank file":
            (folder / "step_00000020.tmp" / RANK_0).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    where: dict[str, tuple[Any, str]] = {
        "in the rank file": (store, "write_rank_file"),
        "before the state": (store, "write_json"),
        "before the name": (Path, "rename"),
        "before latest": (Place, "point_to"),
        "before the old is deleted": (CheckpointStore, "_delete_old"),
    }
    setattr(*where[point], die)
    saved(folder, 20, keep=2)


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("in the rank file", 10),
        ("before the state", 10),
        ("before the name", 10),
        ("before latest", 20),
        ("before the old is deleted", 20),
    ],
)
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, point: str, newest: int) -> None:
    """A half-written checkpoint would be picked up, at every restart again."""
    folder = tmp_path / "checkpoints"
    assert ranks.start(tmp_path / "logs", 1, killed_in_save, point, folder).wait() == [-signal.SIGKILL]
    found, rejected = CheckpointStore(folder, ALONE, 2).newest_valid()
    assert found is not None
    assert found.state["step"] == newest
    expected = {"before latest": 'latest: it names "step_00000010", which is older', "before the old is deleted": None}
    told = expected.get(point, "step_00000020.tmp: this save was cut short")
    assert rejected == ([] if told is None else [told])
    saved(folder, 30, 40, keep=2)
    assert names(folder) == ["latest", "step_00000030", "step_00000040"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def on_a_full_disk(disk: Path, words: list[str]) -> None:
    """Train on a disk that is full to the last byte from the save of update 10 until that of update 30.

    Files keep what is left of their last page of 4 KiB; the rows of 15 updates are more than that. However often a save
    is tried again in between, nothing is freed.
    """
    save = CheckpointStore.save

    def crowded(self: CheckpointStore, state: FlatState, *arguments: Any, **more: Any) -> str | None:
        filler = disk / "filler"
        if self.world.first and state.update == 10:
            with filler.open("ab", buffering=0) as file:
                for size in (1 << 16, 1):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
        if self.world.first and state.update == 30:
            filler.unlink(missing_ok=True)
        self.world.barrier()
        return save(self, state, *arguments, **more)

    CheckpointStore.save = crowded  # type: ignore[method-assign]
    main(words)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    prepared: dict[str, Any], tmp_path: Path, tiny_disk: Path
) -> None:
    """A disk that others filled for an hour would end the run, or leave it without its older checkpoints."""
    run = tiny_disk / "run"
    words = command(prepared, run, "engine.kind=fsdp", "checkpoint.every=5 steps", "schedule.horizon=30 steps")
    running = ranks.start(tmp_path / "logs", 2, on_a_full_disk, tiny_disk, words).succeeded()
    again = "NOT SAVED, it is tried again while training goes on"
    assert re.search(rf"step 10  {again}: rank 0: it takes .* KiB, and 0 bytes are free: make room", running.text())
    assert re.search(rf"step 25  {again}: .*metrics.jsonl could not be written: No space left", running.text())
    assert running.text().count("its rows wait in memory") == 1
    assert names(run / "checkpoints") == ["latest", "step_00000005", "step_00000030"]
    for update in (5, 30):
        assert CheckpointStore(run / "checkpoints", ALONE, 3).fault(f"step_{update:08d}") == ""
    assert [json.loads(row)["step"] for row in history(run)] == list(range(1, 31))


def one_rank_refused(words: list[str]) -> None:
    """Train where the disk of the second rank refuses to write at update 10, after half the file."""
    from llmtrain.checkpoint import saver, store

    saver.RETRY_S = saver.LAST_SAVE_PATIENCE_S = 0.3

    def refuse(path: Path, state: FlatState, metadata: dict[str, str]) -> None:
        if state.update == 10 and path.name.startswith("rank_00001"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_rank_file(path, state, metadata)

    store.write_rank_file = refuse
    main(words)


def test_one_full_disk_of_many_is_told_by_rank(prepared: dict[str, Any], tmp_path: Path) -> None:
    """The ranks that could write would wait for ever for the one that could not."""
    words = command(prepared, tmp_path / "run", "engine.kind=fsdp", "checkpoint.every=5 steps")
    running = ranks.start(tmp_path / "logs", 2, one_rank_refused, words).succeeded()
    assert running.text().count("step 10  NOT SAVED, it is tried again while training goes on: rank 1: [Errno 28]") >= 1
    kept = ["latest", "step_00000005", "step_00000015", "step_00000020"]
    assert names(tmp_path / "run/checkpoints") == kept

    words = command(prepared, tmp_path / "last", "engine.kind=fsdp", "run.stop_at=10 steps")
    running = ranks.start(tmp_path / "last_logs", 2, one_rank_refused, words)
    assert running.wait() == [2, 2], running.text()
    assert running.text().count("the checkpoint of update 10 could not be written: rank 1: [Errno 28]") == 1
    assert names(tmp_path / "last/checkpoints") == []


def without_pickle(words: list[str]) -> None:
    """Train where nothing can be unpickled."""
    import pickle

    def refuse(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("something was unpickled")

    pickle.load = pickle.loads = pickle.Unpickler = refuse  # type: ignore[assignment,misc]
    torch.load = refuse
    main(words)


@pytest.mark.parametrize(("engine", "count"), [("single", 1), ("zero3", 2)])
def test_no_file_of_a_run_needs_pickle(prepared: dict[str, Any], tmp_path: Path, engine: str, count: int) -> None:
    """A checkpoint from somebody else could run a program, and one from an older torch could not be read."""
    words = ENGINES[engine]
    first = command(prepared, tmp_path / "run", *words, "run.stop_at=3 steps")
    ranks.start(tmp_path / "first", count, main, first).succeeded()
    second = command(prepared, tmp_path / "run", *words, "run.stop_at=6 steps", resume="must")
    ranks.start(tmp_path / "second", count, without_pickle, second).succeeded()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "latest"]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".yaml", ".npy"}
    assert [np.load(path).dtype for path in files if path.suffix == ".npy"] == [np.float64]  # refuses pickles by itself
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_a_rank_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """A damaged file would end in a traceback from a library."""
    for data in (b"", b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]", b'\x0c\0\0\0\0\0\0\0{"a": "half"'):
        path = tmp_path / RANK_0
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=RANK_0):
            FlatReader(Place(tmp_path), [RANK_0])
