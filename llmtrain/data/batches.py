"""What does a rank feed its model? The batches of update k, and the fixed windows that validation scores.

Letters: B = sequences of a micro-batch, T = seq_len. A position whose target is IGNORE does not count in the loss.
With a document mask, `document_ids` numbers the documents of each sequence from 0; a document's EOS belongs to it.
"""

import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue

import numpy as np
import numpy.typing as npt
import torch

from llmtrain.config import content_hash
from llmtrain.data.dataset import PreparedData, TokenBytes
from llmtrain.data.order import START, Consumed, Order, rank_samples, update_samples
from llmtrain.data.shards import TokenFile
from llmtrain.errors import DataError

IGNORE = -100
_AHEAD = 2  # updates read before they are asked for

_Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `num_valid` counts targets that are not IGNORE; it is counted once, where the batch is built.

    `all_valid` says that no target is IGNORE, neither here nor in the micro-batch that any other rank has now: so all
    ranks know without asking how many targets count, and none of them asks.
    """

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    document_ids: torch.Tensor | None = None  # (B, T) int32
    num_valid: int = -1
    all_valid: bool = False

    def __post_init__(self) -> None:
        if self.all_valid:
            object.__setattr__(self, "num_valid", self.targets.numel())
        elif self.num_valid < 0:
            object.__setattr__(self, "num_valid", int((self.targets != IGNORE).sum()))

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; the copy is asynchronous where the memory is pinned."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            None if self.document_ids is None else self.document_ids.to(device, non_blocking=True),
            self.num_valid,
            self.all_valid,
        )

    def pin(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while it computes."""
        ids = None if self.document_ids is None else self.document_ids.pin_memory()
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory(), ids, self.num_valid, self.all_valid)


def _batch(tokens: _Array, targets: _Array, eos_id: int | None, *, all_valid: bool = False) -> Batch:
    """`eos_id` where documents are to be numbered, else None."""
    ids = None
    if eos_id is not None:
        ends = np.zeros(tokens.shape, dtype=np.int32)
        np.cumsum(tokens[:, :-1] == eos_id, axis=1, out=ends[:, 1:])
        ids = torch.from_numpy(ends)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), ids, all_valid=all_valid)


class TrainBatches:
    """This rank's share of every global batch after `since`, as a pure function of the update number."""

    def __init__(
        self,
        data: PreparedData,
        order: Order,
        *,
        sequences: int,
        micro: int,
        seq_len: int,
        rank: int,
        world_size: int,
        since: Consumed = START,
        document_mask: bool = False,
        pin: bool = False,
    ) -> None:
        assert sequences % (micro * world_size) == 0, f"{sequences} sequences over {world_size} ranks of {micro}"
        self._tokens = data.train
        self._order = order
        self._sequences = sequences
        self._micro = micro
        self._seq_len = seq_len
        self._rank = rank
        self._world_size = world_size
        self._since = since
        self._eos_id = data.manifest.eos_id if document_mask else None
        self._pin = pin

    def update(self, k: int) -> list[Batch]:
        """The micro-batches of update k (from 1) on this rank, in the order they are accumulated."""
        ids = update_samples(self._order, k, self._sequences, self._since)
        rows = np.empty((self._micro, self._seq_len + 1), dtype=np.int64)
        return [self._read(row, rows) for row in rank_samples(ids, self._world_size, self._rank, self._micro)]

    def consumed(self, k: int) -> int:
        """Samples consumed through update k, over the whole run."""
        return self._since.through(k, self._sequences)

    def iterate(self, first_update: int, last_update: int) -> Generator[list[Batch], None, None]:
        """`update(first_update)` to `update(last_update)`, read ahead by a thread that ends with this generator."""
        ready: Queue[list[Batch] | BaseException] = Queue(maxsize=_AHEAD)
        stop = threading.Event()

        def offer(item: list[Batch] | BaseException) -> None:
            while not stop.is_set():
                with suppress(Full):
                    ready.put(item, timeout=0.2)
                    return

        def fill() -> None:
            try:
                for k in range(first_update, last_update + 1):
                    if stop.is_set():
                        return
                    offer(self.update(k))
            except BaseException as error:  # the consumer raises it
                offer(error)

        reader = threading.Thread(target=fill, name="llmtrain-batches", daemon=True)
        reader.start()
        try:
            for _ in range(first_update, last_update + 1):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            _drain(ready)
            reader.join()

    def _read(self, ids: npt.NDArray[np.int64], rows: _Array) -> Batch:
        """The batch of samples `ids`, read by way of `rows` (B, T + 1)."""
        T = self._seq_len
        for row, sample in zip(rows, ids.tolist(), strict=True):
            self._tokens.read_into(row, sample * T)
        batch = _batch(rows[:, :-1].copy(), rows[:, 1:].copy(), self._eos_id, all_valid=True)
        return batch.pin() if self._pin else batch


def _drain(queue: "Queue[list[Batch] | BaseException]") -> None:
    """Make room, so that a reader waiting to put something sees that it should stop."""
    with suppress(Empty):
        while True:
            queue.get_nowait()


class ValidationSet:
    """Fixed windows over a stream of tokens: every token but the first is scored exactly once, nothing is dropped.

    `max_tokens` scores only the first so many. The last window is padded with ignored targets. `hash` names what is
    scored and in which windows; numbers are comparable where it is equal.
    """

    def __init__(
        self,
        name: str,
        tokens: TokenFile,
        token_bytes: TokenBytes,
        *,
        seq_len: int,
        max_tokens: int | None,
        eos_id: int,
        document_mask: bool,
        set_hash: str,
    ) -> None:
        self.name = name
        self.num_tokens = min(len(tokens) - 1, max_tokens or len(tokens))
        if self.num_tokens < 1:
            raise DataError(
                f'validation set "{name}" has {len(tokens)} tokens, at least 2 are needed: '
                "raise data.validation_fraction and prepare again"
            )
        self.num_sequences = -(-self.num_tokens // seq_len)
        self.hash = content_hash([set_hash, self.num_tokens, seq_len])
        self._tokens = tokens
        self._seq_len = seq_len
        self._eos_id = eos_id if document_mask else None
        self.num_bytes = -int(token_bytes[tokens.read(0, 1)].sum())  # the first token is not scored
        ends = []
        for start in range(0, self.num_tokens + 1, 1 << 20):
            piece = tokens.read(start, min(1 << 20, self.num_tokens + 1 - start))
            self.num_bytes += int(token_bytes[piece].sum())
            ends.append(start + np.flatnonzero(piece == eos_id))
        self._ends = np.concatenate(ends)
        self.document_tokens = np.diff(np.concatenate([[0], self._ends, [self.num_tokens]]))  # (D,)

    def documents(self, window: int, count: int) -> _Array:
        """The document, from 0, that each target of `count` windows from `window` on belongs to, its EOS included."""
        at = 1 + np.arange(window * self._seq_len, (window + count) * self._seq_len)
        return np.searchsorted(self._ends, np.minimum(at, self.num_tokens))

    def num_batches(self, world_size: int, micro: int) -> int:
        """How many batches `batches` gives: the same on every rank, known from lengths alone."""
        return -(-self.num_sequences // (world_size * micro))

    def batches(self, rank: int, world_size: int, micro: int) -> Iterator[Batch]:
        """This rank's batches, each (micro, T). A rank that runs out early gets rows whose targets are all ignored."""
        for index in range(self.num_batches(world_size, micro)):
            first = (index * world_size + rank) * micro
            yield self._read(range(first, first + micro))

    def _read(self, windows: range) -> Batch:
        T = self._seq_len
        tokens = np.zeros((len(windows), T), dtype=np.int64)
        targets = np.full((len(windows), T), IGNORE, dtype=np.int64)
        for row, window in enumerate(windows):
            length = min(T, self.num_tokens - window * T)
            if length > 0:
                piece = self._tokens.read(window * T, length + 1)
                tokens[row, :length] = piece[:-1]
                targets[row, :length] = piece[1:]
        return _batch(tokens, targets, self._eos_id)
