"""How do tokens lie on disk, and how are they read without loading them?

A token file is a 64-byte header and then raw little-endian tokens: uint16 where the vocabulary fits (<= 65536), else
uint32. One split of a prepared folder is one long stream of tokens over one or more such files. Every file is written
beside its place, synced, and renamed, so a file that carries its final name is whole.

Header: magic, version u32, bytes per token u32, vocab_size u32, zero u32, token count u64, tokenizer hash (32 bytes).
"""

import functools
import hashlib
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from llmtrain.descriptors import limit
from llmtrain.errors import DataError

Tokens = npt.NDArray[np.integer]

MAGIC = b"LLMTRAIN"
VERSION = 1
HEADER = struct.Struct("<8sIIIIQ32s")
_MOST_MAPS = 2**14  # of a stream at once; Linux gives a process 65,530 mappings


class Shard(BaseModel):
    """One token file, as the manifest knows it. `bytes` is the file's size, `hash` BLAKE2b of its tokens."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    file: str
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    hash: str


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The smallest type that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes its name `path` only when it is whole and on disk."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_shard(path: Path, chunks: Iterable[Tokens], *, vocab_size: int, tokenizer_hash: str) -> Shard:
    """Write one token file from pieces of its stream, so that it need not fit in memory."""
    dtype = token_dtype(vocab_size)
    digest = hashlib.blake2b(digest_size=16)
    count = 0
    with atomic_file(path) as file:
        file.write(bytes(HEADER.size))
        for chunk in chunks:
            assert not chunk.size or (chunk.min() >= 0 and chunk.max() < vocab_size), "a token outside the vocabulary"
            raw = chunk.astype(dtype).tobytes()
            digest.update(raw)
            file.write(raw)
            count += chunk.size
        file.seek(0)
        file.write(
            HEADER.pack(MAGIC, VERSION, dtype.itemsize, vocab_size, 0, count, bytes.fromhex(tokenizer_hash)),
        )
    size = HEADER.size + count * dtype.itemsize
    return Shard(file=path.name, tokens=count, bytes=size, hash=digest.hexdigest())


def check_shard(path: Path, shard: Shard, *, vocab_size: int, tokenizer_hash: str, remedy: str) -> None:
    """Compare a file's size and header with what the manifest says. Raises DataError naming what differs."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"cannot read token file {path}: {error.strerror}. {remedy}") from None
    if len(header) < HEADER.size:
        raise DataError(f"token file {path} is truncated: {size} bytes, the header alone has {HEADER.size}. {remedy}")
    magic, version, itemsize, vocab, _, tokens, tokenizer = HEADER.unpack(header)
    if magic != MAGIC:
        raise DataError(f"{path} is not a token file: it begins with {magic!r}, wanted {MAGIC!r}. {remedy}")
    facts = (
        ("format version", version, VERSION),
        ("bytes per token", itemsize, token_dtype(vocab_size).itemsize),
        ("vocabulary size", vocab, vocab_size),
        ("tokenizer hash", tokenizer.hex(), tokenizer_hash),
        ("number of tokens", tokens, shard.tokens),
    )
    for name, found, wanted in facts:
        if found != wanted:
            raise DataError(f"token file {path}: {name} is {found}, the manifest wants {wanted}. {remedy}")
    wanted_size = HEADER.size + tokens * itemsize
    if size != wanted_size or size != shard.bytes:
        word = "truncated" if size < wanted_size else "damaged"
        raise DataError(f"token file {path} is {word}: {size} bytes, wanted {wanted_size}. {remedy}")


class TokenFile:
    """One split of a prepared folder: a stream of tokens over its shards, read where it lies.

    A shard is opened when it is first read, and compared by `check` with what the manifest says; those read last stay
    mapped. A mapping holds a file descriptor, and a large set may have more shards than a process may open files: a
    quarter of these is what a stream keeps.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        dtype: np.dtype[np.integer],
        check: Callable[[Path, Shard], None] | None = None,
    ) -> None:
        self.paths = [folder / shard.file for shard in shards]
        self.dtype = dtype
        self._shards = list(shards)
        self._begins = [0, *accumulate(shard.tokens for shard in shards)]  # of each shard, and the end of the last
        self._check = check
        self._checked: set[int] = set()
        self._map = functools.lru_cache(maxsize=max(16, min(limit() // 4, _MOST_MAPS)))(self._open_map)

    def __len__(self) -> int:
        return self._begins[-1]

    def read(self, start: int, count: int) -> Tokens:
        """Tokens start to start + count - 1 as a fresh array, across the borders of shards."""
        found = np.empty(count, dtype=self.dtype)
        self.read_into(found, start)
        return found

    def read_into(self, found: npt.NDArray[np.integer], start: int) -> None:
        """Fill `found`, of this or a wider type, with the tokens from `start` on."""
        count, filled = len(found), 0
        assert 0 <= start <= len(self) - count, f"{start}+{count} of {len(self)}"
        index = bisect_right(self._begins, start) - 1
        while filled < count:
            begin, end = self._begins[index : index + 2]
            if begin < end:
                piece = self._map(index)[start + filled - begin : start + count - begin]
                found[filled : filled + len(piece)] = piece
                filled += len(piece)
            index += 1

    def chunks(self, size: int = 1 << 22) -> Iterator[Tokens]:
        """The whole stream in order, `size` tokens at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(size, len(self) - start))

    def verify(self, remedy: str) -> None:
        """Read every token and compare each shard's hash with the manifest's: a full check, minutes on a large set."""
        for path, shard in zip(self.paths, self._shards, strict=True):
            digest = hashlib.blake2b(digest_size=16)
            with path.open("rb") as file:
                file.seek(HEADER.size)
                while block := file.read(1 << 24):
                    digest.update(block)
            if digest.hexdigest() != shard.hash:
                raise DataError(f"token file {path}: hash is {digest.hexdigest()}, wanted {shard.hash}. {remedy}")

    def check(self, rank: int, ranks: int, most: int) -> int:
        """Compare rank `rank`'s share of the shards, of `ranks` that share them, with the manifest. Returns how many.

        Every shard is there and of its size; of the first `most` the header is read, of the others when they are first
        read. Raises DataError naming what differs.
        """
        assert self._check is not None, "this stream was made without a manifest"
        share = range(rank, len(self._shards), ranks)
        for index in share[:most]:
            self._check(self.paths[index], self._shards[index])
            self._checked.add(index)
        for index in share[most:]:
            try:
                size = self.paths[index].stat().st_size
            except OSError:
                size = -1
            if size != self._shards[index].bytes:
                self._check(self.paths[index], self._shards[index])
        return len(share)

    def _open_map(self, index: int) -> Tokens:
        if self._check is not None and index not in self._checked:
            self._check(self.paths[index], self._shards[index])
            self._checked.add(index)
        shape = (self._shards[index].tokens,)
        mapped = np.memmap(self.paths[index], dtype=self.dtype, mode="r", offset=HEADER.size, shape=shape)
        return mapped.view(np.ndarray)  # every slice of a memmap would be one, which costs more than to read it
