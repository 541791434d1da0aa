"""Which samples does update k train on? A pure function of (data hash, seed, position), so a resume needs no state.

Conventions: positions count from 0 over the whole run, epochs one after another; epoch = position // num_samples.
Each epoch is its own keyed permutation of the samples: a Feistel network over the next power of four, walked along its
cycle until it lands on a sample (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3). It needs
no index array, so position 10**12 costs what position 0 costs. Only 64-bit integer arithmetic is used: the order is
the same on every platform and with every NumPy, and it is part of the file formats: it never changes.

Updates count from 1. The global batch of update k is positions (k-1)*sequences onwards, whoever computes it. Where
the global batch changed on the way, `Consumed` says where the updates since then count from.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 8
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)  # SplitMix64's finaliser (Steele et al. 2014, "Fast Splittable ...")
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


class Consumed(NamedTuple):
    """A place in the data: the first `update` updates consumed the first `samples` positions."""

    update: int = 0
    samples: int = 0

    def through(self, update: int, sequences: int) -> int:
        """Samples consumed through `update`, when each update from here on takes `sequences`."""
        assert update >= self.update
        return self.samples + (update - self.update) * sequences


START = Consumed()


@dataclass(frozen=True)
class Order:
    """The order in which `num_samples` samples are visited, epoch after epoch."""

    num_samples: int
    seed: int
    data_hash: str

    def __post_init__(self) -> None:
        assert 1 <= self.num_samples <= 2**60, f"{self.num_samples} samples cannot be ordered"

    def samples(self, start: int, count: int) -> Ids:
        """Sample ids at positions start to start + count - 1; an epoch may end among them."""
        assert start >= 0 and count >= 0
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_samples)
            length = min(count, self.num_samples - offset)
            parts.append(self._permute(np.arange(offset, offset + length, dtype=np.uint64), epoch))
            start += length
            count -= length
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _permute(self, values: _Words, epoch: int) -> Ids:
        half_bits = np.uint64(max(1, (max(self.num_samples - 1, 1).bit_length() + 1) // 2))
        keys = self._keys(epoch)
        values = _feistel(values, half_bits, keys)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:  # the domain is less than four times too large: a few walks
            values[outside] = _feistel(values[outside], half_bits, keys)
            outside = outside[values[outside] >= self.num_samples]
        return values.astype(np.int64)

    def _keys(self, epoch: int) -> _Words:
        text = f"llmtrain order 1\0{self.data_hash}\0{self.seed}\0{epoch}"
        digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: _Words, half_bits: np.uint64, keys: _Words) -> _Words:
    """One keyed permutation of the integers below 4**half_bits."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    joined: _Words = (left << half_bits) | right
    return joined


def _mix(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIER_1
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIER_2
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed


def update_samples(order: Order, update: int, sequences: int, since: Consumed = START) -> Ids:
    """Sample ids of the global batch of `update` (from 1), in the order that ranks share them out."""
    assert update >= 1 and sequences >= 1
    return order.samples(since.through(update - 1, sequences), sequences)


def rank_samples(ids: Ids, world_size: int, rank: int, micro: int) -> Ids:
    """The share of one rank, (accumulation, micro): its micro-step a takes ids (a*world_size + rank)*micro onwards."""
    assert 0 <= rank < world_size and len(ids) % (world_size * micro) == 0
    return ids.reshape(-1, world_size, micro)[:, rank]
