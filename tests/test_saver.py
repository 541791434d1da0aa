"""Saving in the background: training goes on, what is saved is the state of its moment, and no failure is silent."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain.checkpoint import saver as saver_module
from llmtrain.checkpoint import store as store_module
from llmtrain.checkpoint.flat import write_rank_file
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.store import CheckpointStore, open_checkpoint
from llmtrain.cli import main
from llmtrain.config_file import load_config
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import EXP_AVG, WEIGHT, FlatState
from llmtrain.errors import CheckpointError
from llmtrain.train.metrics import read_metrics
from tests import ranks
from tests.test_checkpoint import ALONE, KINDS, flat, names
from tests.test_layouts import first_difference
from tests.test_resume import history, weights
from tests.test_train import command, train_here

State = tuple[Saver, FlatState, list[str]]


@pytest.fixture
def saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """A saver of a state that goes on changing, and what it says."""
    monkeypatch.setattr(saver_module, "RETRY_S", 0.01)
    state = flat(0)
    said: list[str] = []
    with Saver(CheckpointStore(tmp_path, ALONE, 9), state, said.append, background=True) as saver:
        yield saver, state, said


def save(saver: Saver, state: FlatState, update: int, unready: Callable[[], str] = lambda: "") -> None:
    saver.save(state._replace(update=update), {"step": update}, {}, unready, ephemeral=False)


def train_on(state: FlatState) -> None:
    """What the next update does to the state."""
    for piece in state.slices:
        for tensor in piece.tensors.values():
            tensor.add_(100)


def first_weight(folder: Path, update: int) -> float:
    return open_checkpoint(folder / f"step_{update:08d}").reader.read("a.weight", WEIGHT, 0, 1).item()


def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Rank files are written only once this is set."""
    opened = threading.Event()

    def write(*arguments: Any) -> None:
        assert opened.wait(60)
        write_rank_file(*arguments)

    monkeypatch.setattr(store_module, "write_rank_file", write)
    return opened


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """The disk refuses so many times; returns the list of updates that were tried."""
    tried: list[int] = []

    def write(path: Path, state: FlatState, metadata: dict[str, str]) -> None:
        tried.append(state.update)
        if len(tried) <= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_rank_file(path, state, metadata)

    monkeypatch.setattr(store_module, "write_rank_file", write)
    return tried


def test_training_goes_on_and_the_checkpoint_is_of_its_moment(
    saving: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint would mix weights of one update with moments of another, and nobody would see it."""
    saver, state, said = saving
    opened = gate(monkeypatch)
    save(saver, state, 10)  # returns although nothing can be written
    train_on(state)
    assert not said
    opened.set()
    assert saver.finish() is None
    assert first_weight(tmp_path, 10) == 0.0
    assert said == [f"step 10  saved {tmp_path}/step_00000010"]


def test_the_next_save_waits_for_the_last(saving: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves would pile up in memory on a slow disk, or overwrite the buffers that are being written."""
    saver, state, _ = saving
    opened = gate(monkeypatch)
    save(saver, state, 10)
    train_on(state)
    second = threading.Thread(target=save, args=(saver, state, 20))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    opened.set()
    second.join(60)
    assert saver.finish() is None
    assert [first_weight(tmp_path, update) for update in (10, 20)] == [0.0, 100.0]


def test_a_failed_write_is_told_and_tried_again(saving: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute without space would cost a checkpoint, or nobody would hear of it for hours."""
    saver, state, said = saving
    tried = failing(monkeypatch, times=2)
    save(saver, state, 10)
    train_on(state)
    assert saver.finish() is None
    assert tried == [10, 10, 10]
    assert first_weight(tmp_path, 10) == 0.0
    failed = "step 10  NOT SAVED, it is tried again while training goes on: rank 0: [Errno 28] No space left on device"
    assert said == [failed, failed, f"step 10  saved {tmp_path}/step_00000010"]
    assert names(tmp_path) == ["latest", "step_00000010"]


def test_a_failing_save_gives_way_to_newer_state(
    saving: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would stand still until somebody makes space."""
    saver, state, _ = saving
    monkeypatch.setattr(saver_module, "RETRY_S", 60.0)
    failing(monkeypatch, times=1)
    save(saver, state, 10)
    save(saver, state, 20)
    assert saver.finish() is None
    assert names(tmp_path) in (["latest", "step_00000020"], ["latest", "step_00000010", "step_00000020"])


def test_a_run_that_ends_does_not_try_for_ever(saving: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job would burn its allocation at a disk that stays full, or end as if it had saved."""
    saver, state, said = saving
    monkeypatch.setattr(saver_module, "LAST_SAVE_PATIENCE_S", 0.2)
    tried = failing(monkeypatch, times=10**9)
    save(saver, state, 10)
    assert "No space left" in str(saver.finish())
    assert len(tried) >= 2
    assert len(said) == len(tried)


def test_what_keeps_a_rank_from_saving_is_asked_before_every_attempt(saving: State, tmp_path: Path) -> None:
    """A checkpoint would be published whose history is not on the disk, or never, once that failed."""
    saver, state, said = saving
    answers = iter(["the log could not be written", "", ""])
    save(saver, state, 10, lambda: next(answers))
    assert saver.finish() is None
    assert "the log could not be written" in said[0]
    assert names(tmp_path) == ["latest", "step_00000010"]


def test_a_mistake_in_the_thread_ends_the_run(saving: State) -> None:
    """The run would go on for days without any checkpoint."""
    saver, state, _ = saving
    state.slices[0].tensors[EXP_AVG] = state.slices[0].tensors[EXP_AVG].bfloat16()
    saver.staging = {(p.name, kind): t.clone() for p in state.slices for kind, t in p.tensors.items()}
    save(saver, state, 10)
    with pytest.raises(CheckpointError, match="state below fp32"):
        saver.finish()


def test_one_buffer_holds_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank would pin up to twice the memory of its state: every slice, or the whole, up to a power of two."""
    pinned: list[Any] = []

    def register(address: int, size: int, flags: int) -> int:
        pinned.append((address, size))
        return 0

    def unregister(address: int) -> None:
        pinned.remove((address, 3 * 1007 * 4))

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    state = flat(0)
    staging = saver_module._staging(state)
    storages = {tensor.untyped_storage().data_ptr() for tensor in staging.values()}
    [(address, size)] = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in staging.values()}
    assert len(staging) == 6 and storages == {address}
    assert size == sum(tensor.nbytes for piece in state.slices for tensor in piece.tensors.values()) == 3 * 1007 * 4
    assert sorted(tensor.data_ptr() - address for tensor in staging.values())[1] == 4000  # one after another
    saver_module._pin(torch.zeros(0).set_(staging["a.weight", WEIGHT].untyped_storage()))  # type: ignore[call-overload]
    assert pinned == [(address, size)]
    del staging
    assert pinned == []  # else the driver keeps what another tensor's memory is by now


@pytest.mark.parametrize("copies", [1, 2, 3, 7, 2000])
def test_copies_write_each_element_once(copies: int) -> None:
    """Elements would be missing from a checkpoint, or one node would write for all."""
    whole = flat(0)
    shares = [FlatState(whole.slices, 0, copy, copies).share() for copy in range(copies)]
    held = [sum(piece.stop - piece.start for piece in share) for share in shares]
    assert max(held) - min(held) <= 1
    for piece in whole.slices:
        for kind, tensor in piece.tensors.items():
            parts = [part for share in shares for part in share if part.name == piece.name]
            assert [part.start for part in parts] == [0, *(part.stop for part in parts)][:-1]
            assert torch.equal(torch.cat([part.tensors[kind] for part in parts]), tensor)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (2, ("engine.kind=fsdp", "engine.shard_ranks=1")),
        (4, ("engine.kind=fsdp", "engine.shard_ranks=2")),
        (2, ("engine.kind=deepspeed", "engine.zero_stage=0")),
    ],
    ids=["2x1", "2x2", "zero0"],
)
def test_copies_of_shards_save_together(
    prepared: dict[str, Any], tmp_path: Path, count: int, words: tuple[str, ...]
) -> None:
    """The first node would write everything while the others wait, or a run of copies could not be gone on with."""
    for name, stops in (("straight", (20,)), ("halves", (10, 20))):
        for stop in stops:
            line = command(prepared, tmp_path / name, *words, f"run.stop_at={stop} steps")
            ranks.start(tmp_path / f"{name}_{stop}", count, main, line).succeeded()
    assert history(tmp_path / "halves") == history(tmp_path / "straight")
    assert weights(tmp_path / "halves") == weights(tmp_path / "straight")
    written = [len(data) for data in weights(tmp_path / "straight")]
    assert len(written) == count and max(written) < 1.1 * min(written)

    folder = tmp_path / "straight/checkpoints/step_00000020"
    saved = open_checkpoint(folder)
    with open_world(60, collectives=False) as world:
        engine = build_engine(load_config(tmp_path / "straight.yaml", ["engine.kind=single"]), world)
        engine.load(saved.reader, saved.step)
        assert first_difference(engine.state(), folder, saved.step) == ""


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def thirty_saves(folder: Path) -> None:
    """Print the resident memory before any save and after 30 saves of 96 MB."""
    state = flat(0)
    state.slices[0] = state.slices[0]._replace(tensors={kind: torch.ones(8_000_000) for kind in KINDS})
    with Saver(CheckpointStore(folder, ALONE, 2), state, lambda text: None, background=True) as saver:
        before = resident_mb()
        for update in range(1, 31):
            save(saver, state, update)
        assert saver.finish() is None
        print("memory", before, resident_mb())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_saves(tmp_path: Path) -> None:
    """A run would be killed for memory after a day of saves."""
    text = ranks.start(tmp_path / "logs", 1, thirty_saves, tmp_path / "run").succeeded().text()
    before, after = map(float, text.split("memory")[1].split())
    assert after < 1.05 * before, text


def refused_on_rank_1(words: list[str]) -> None:
    """Train where the disk of the second rank refuses the last save twice."""
    saver_module.RETRY_S = 0.05
    refused = iter([True, True])

    def write(path: Path, state: FlatState, metadata: dict[str, str]) -> None:
        if path.name.startswith("rank_00001") and next(refused, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_rank_file(path, state, metadata)

    store_module.write_rank_file = write
    main(words)


def test_ranks_try_again_together(prepared: dict[str, Any], tmp_path: Path) -> None:
    """One rank would try again and the others not: the checkpoint would hold two attempts, or the ranks would hang."""
    words = command(prepared, tmp_path / "run", "engine.kind=fsdp")
    text = ranks.start(tmp_path / "logs", 2, refused_on_rank_1, words).succeeded().text()
    assert text.count("step 20  NOT SAVED, it is tried again while training goes on: rank 1: [Errno 28]") == 2
    straight = command(prepared, tmp_path / "straight", "engine.kind=fsdp", "checkpoint.async_save=false")
    ranks.start(tmp_path / "straight_logs", 2, main, straight).succeeded()
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert history(tmp_path / "run") == history(tmp_path / "straight")


def test_saves_between_saves_are_gone_when_they_are_not_needed(prepared: dict[str, Any], tmp_path: Path) -> None:
    """Frequent saves, made to lose little at a crash, would fill the disk or push out the ones to keep."""
    words = ("checkpoint.every=5 steps", "checkpoint.ephemeral=2 steps", "checkpoint.keep=2")
    train_here(prepared, tmp_path / "run", *words, "run.stop_at=13 steps")
    assert names(tmp_path / "run/checkpoints") == ["latest", *(f"step_{update:08d}" for update in (10, 12, 13))]
    train_here(prepared, tmp_path / "run", *words, "checkpoint.keep_every=10 steps")
    assert names(tmp_path / "run/checkpoints") == ["latest", *(f"step_{update:08d}" for update in (10, 15, 18, 20))]


def draw(words: list[str], drawn: Path) -> None:
    """Train, drawing from every generator after every update, as dropout or an augmentation would."""
    import random

    import numpy as np

    from llmtrain.engines.single import SingleEngine

    step = SingleEngine.train_step

    def drawing(self: SingleEngine, *arguments: Any) -> Any:
        with drawn.open("a") as file:
            file.write(f"{self.updates} {random.random()} {np.random.rand()} {torch.rand(()).item()}\n")
        return step(self, *arguments)

    SingleEngine.train_step = drawing  # type: ignore[method-assign]
    main(words)


def test_generators_go_on_where_they_were(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A model with dropout would be another one after every resume."""
    for name, stops in (("straight", (20,)), ("halves", (7, 20))):
        for stop in stops:
            words = command(prepared, tmp_path / name, f"run.stop_at={stop} steps")
            ranks.start(tmp_path / f"{name}_{stop}", 1, draw, words, tmp_path / f"{name}.txt").succeeded()
    expected = (tmp_path / "straight.txt").read_text().splitlines()
    assert len(set(expected)) == 20
    assert (tmp_path / "halves.txt").read_text().splitlines() == expected
    assert weights(tmp_path / "halves") == weights(tmp_path / "straight")


def test_a_run_goes_back_to_a_checkpoint_that_is_named(
    prepared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who wants to go back before a spike would have to delete newer checkpoints by hand, or lose them."""
    run, every = tmp_path / "run", "checkpoint.every=5 steps"
    train_here(prepared, run, every, "checkpoint.keep=9")
    final, rows = weights(run), history(run)
    train_here(prepared, run, "run.stop_at=7 steps", resume=str(run / "checkpoints/step_00000005"))
    assert "RESUMED run=small step=5" in capsys.readouterr().out
    kept = ["step_00000005", "step_00000007", *(f"step_{update:08d}.superseded" for update in (10, 15, 20))]
    assert names(run / "checkpoints") == ["latest", *kept]
    train_here(prepared, run, resume=f"{run}@7")
    assert (weights(run), history(run)) == (final, rows)
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "step"] == list(range(1, 21))

    moved = tmp_path / "moved"
    train_here(prepared, moved, resume=f"{run}@7")
    assert (weights(moved), len(history(moved))) == (final, 13)
    for named, why in ((f"{run}@6", "holds the checkpoints of updates 5, 7, 20"), (str(run), "RUN@UPDATE")):
        with pytest.raises(CheckpointError, match=why):
            train_here(prepared, run, resume=named)
    with pytest.raises(CheckpointError, match="has checkpoints of its own"):
        train_here(prepared, moved, resume=f"{run}@5")
