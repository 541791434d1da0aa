import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.data.batches import IGNORE, Batch, TrainBatches, ValidationSet
from llmtrain.data.dataset import PreparedData
from llmtrain.data.order import Order
from llmtrain.errors import DataError
from tests.test_data_shards import write_folder

T = 5
EOS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    stream = np.random.default_rng(1).integers(0, 100, 1003)
    return write_folder(tmp_path_factory.mktemp("d"), np.split(stream, [333, 700]), stream[:200])


def _batches(data: PreparedData, **changes) -> TrainBatches:
    order = Order(data.num_samples(T), seed=1, data_hash=data.manifest.content_hash)
    shape = {"sequences": 8, "micro": 2, "rank": 0, "world_size": 2, **changes}
    return TrainBatches(data, order, seq_len=T, **shape)


def _same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens) and torch.equal(x.targets, y.targets) for x, y in zip(a, b, strict=True)
    )


def test_targets_are_the_next_tokens_and_an_epoch_covers_the_stream_once(data: PreparedData) -> None:
    """Else the model learns to copy, or part of the text is never seen."""
    stream = data.train.read(0, 1003).astype(np.int64)
    count = data.num_samples(T)
    assert count == 200
    batches = _batches(data, world_size=1, sequences=8, micro=4)
    seen = []
    for update in range(1, count // 8 + 1):
        for batch in batches.update(update):
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            assert batch.num_valid == 4 * T and batch.all_valid
            assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
            seen += [(*row.tolist(), int(last)) for row, last in zip(batch.tokens, batch.targets[:, -1], strict=True)]
    assert sorted(seen) == sorted(tuple(stream[i * T : i * T + T + 1].tolist()) for i in range(count))


def test_the_global_batch_is_the_same_for_every_split(data: PreparedData) -> None:
    """Else a run on more GPUs is another run."""

    def rows(world_size: int, micro: int) -> list[list[int]]:
        ranks = [_batches(data, world_size=world_size, micro=micro, rank=rank).update(17) for rank in range(world_size)]
        return [row.tolist() for step in zip(*ranks, strict=True) for batch in step for row in batch.tokens]

    wanted = rows(1, 8)
    for world_size, micro in [(1, 1), (2, 2), (2, 1), (4, 2), (8, 1)]:
        assert rows(world_size, micro) == wanted


def test_reading_ahead_changes_nothing(data: PreparedData) -> None:
    """Else a resumed run, which starts reading elsewhere, gets other batches."""
    batches = _batches(data)
    for first, last in [(1, 30), (11, 30), (51, 51)]:
        read = list(batches.iterate(first, last))
        assert len(read) == last - first + 1
        assert all(_same(found, batches.update(k)) for k, found in enumerate(read, start=first))
    assert list(batches.iterate(5, 4)) == []


def _readers() -> int:
    return sum(thread.name == "llmtrain-batches" for thread in threading.enumerate())


def test_the_reader_ends_with_its_consumer(data: PreparedData) -> None:
    """Else a run that stopped early hangs at exit, or keeps reading for nobody."""
    batches = _batches(data)
    ahead: Iterator[list[Batch]] = batches.iterate(1, 10**9)
    next(ahead)
    assert _readers() == 1
    ahead.close()
    assert _readers() == 0
    list(batches.iterate(1, 3))
    assert _readers() == 0


def test_an_error_while_reading_reaches_the_consumer(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a disk error leaves the trainer waiting for ever."""
    batches = _batches(data)
    whole = batches.update

    def failing(k: int) -> list[Batch]:
        if k == 4:
            raise OSError("the disk is gone")
        return whole(k)

    monkeypatch.setattr(batches, "update", failing)
    ahead = batches.iterate(1, 9)
    assert [len(next(ahead)) for _ in range(3)] == [2, 2, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert _readers() == 0


def test_documents_are_numbered_by_their_ends(tmp_path: Path) -> None:
    """Else attention crosses from one document into the next, or an EOS is cut off from what it ends."""
    stream = np.array([7, EOS, EOS, 8, 9, 10, 11, 12, 13, EOS, 5])
    data = write_folder(tmp_path, [stream], stream)
    rows = {}
    for batch in _batches(data, world_size=1, sequences=2, micro=1, document_mask=True).update(1):
        assert batch.document_ids is not None and batch.document_ids.dtype == torch.int32
        rows[int(batch.tokens[0, 0])] = batch.document_ids[0].tolist()
    assert rows == {7: [0, 0, 1, 2, 2], 10: [0, 0, 0, 0, 0]}
    assert _batches(data, world_size=1, sequences=2, micro=1).update(1)[0].document_ids is None


def test_a_batch_counts_what_is_scored(data: PreparedData) -> None:
    """Else the loss is divided by the wrong number of tokens."""
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 0]]))
    assert batch.num_valid == 3 and not batch.all_valid
    moved = batch.to("meta")
    assert moved.num_valid == 3 and moved.tokens.device.type == "meta" and moved.document_ids is None


def _validation(data: PreparedData, max_tokens: int | None = None, **changes) -> ValidationSet:
    return ValidationSet(
        "validation",
        data.validation,
        data.token_bytes,
        **{
            "seq_len": T,
            "max_tokens": max_tokens,
            "eos_id": EOS,
            "document_mask": False,
            "set_hash": data.manifest.validation_hash,
            **changes,
        },
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_every_target_is_scored_once_and_every_rank_has_as_many_batches(
    tmp_path: Path, world_size: int, micro: int
) -> None:
    """Else perplexity depends on the number of GPUs, or validation hangs in a collective."""
    for sequences in {1, max(1, world_size - 1), world_size + 1, 37}:
        for length in (sequences * T + 1, sequences * T - T + 2):  # whole windows; one token in the last
            stream = np.random.default_rng(length).integers(0, 100, length)
            data = write_folder(tmp_path / f"{length}", [stream], stream)
            windows = _validation(data)
            assert windows.num_sequences == sequences
            assert windows.num_tokens == length - 1
            ranks = [list(windows.batches(rank, world_size, micro)) for rank in range(world_size)]
            assert {len(batches) for batches in ranks} == {windows.num_batches(world_size, micro)}
            assert all(batch.tokens.shape == (micro, T) for batches in ranks for batch in batches)
            assert sum(batch.num_valid for batches in ranks for batch in batches) == length - 1
            pairs = [
                (int(token), int(target))
                for step in zip(*ranks, strict=True)
                for batch in step
                for token, target in zip(batch.tokens.flatten(), batch.targets.flatten(), strict=True)
                if target != IGNORE
            ]
            assert pairs == list(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))


def test_bytes_and_the_hash_belong_to_what_is_scored(data: PreparedData) -> None:
    """Else nats per byte is off, or numbers of different sets are ranked against each other."""
    whole, part = _validation(data), _validation(data, max_tokens=12)
    targets = data.validation.read(1, 199)
    assert (whole.num_tokens, whole.num_bytes) == (199, int(data.token_bytes[targets].sum()))
    assert (part.num_tokens, part.num_sequences) == (12, 3)
    assert part.num_bytes == int(data.token_bytes[targets[:12]].sum())
    assert sum(batch.num_valid for batch in part.batches(0, 1, 2)) == 12
    hashes = [whole.hash, part.hash, _validation(data, seq_len=4).hash, _validation(data, set_hash="x").hash]
    assert len(set(hashes)) == 4
    assert whole.hash == _validation(data, max_tokens=10**9).hash


def test_a_set_with_nothing_to_score_is_refused(tmp_path: Path) -> None:
    """Else the perplexity of nothing is a division by zero at the end of a run."""
    data = write_folder(tmp_path, [np.arange(50)], np.arange(1))
    with pytest.raises(DataError, match=r'set "validation" has 1 tokens.*raise data.validation_fraction'):
        _validation(data)
