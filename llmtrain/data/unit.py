"""What becomes of one unit of text? One train shard, one part of the validation split, and a record of both.

A unit is a run of documents of about data.shard_bytes of text, the unit of work and of restart. What it writes is a
function of its documents and the settings alone, whichever process does it. The record is written last: a unit that
has one is finished.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from llmtrain.data.manifest import Split
from llmtrain.data.shards import Tokens, atomic_file, check_shard, write_shard
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.errors import DataError

UNITS_FOLDER = ".units"


class UnitRecord(BaseModel):
    """A finished unit. `read` counts the documents it took from the source, empty ones included."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    settings_hash: str
    tokenizer_hash: str
    read: NonNegativeInt
    train: Split
    validation: Split

    @property
    def bytes(self) -> int:
        return self.train.bytes + self.validation.bytes


@dataclass(frozen=True)
class UnitPlace:
    """Where unit `index` of the prepared folder `folder` is written, and with what."""

    folder: Path
    index: int
    settings_hash: str
    tokenizer: bytes
    validation_fraction: float

    @property
    def train_path(self) -> Path:
        return self.folder / f"train-{self.index:06d}.bin"

    @property
    def validation_path(self) -> Path:
        return self._beside("validation.bin")

    @property
    def counts_path(self) -> Path:
        return self._beside("counts.npy")

    @property
    def record_path(self) -> Path:
        return self._beside("json")

    def _beside(self, ending: str) -> Path:
        return self.folder / UNITS_FOLDER / f"{self.index:06d}.{ending}"


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is validated on: by its content alone, so that its copies are all on the same side."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < fraction * 2**64


def tokenize_unit(place: UnitPlace, texts: Sequence[str]) -> UnitRecord:
    """Write one unit. `counts_path` gets how often each id occurs in its train shard, for the unigram baseline."""
    tokenizer = Tokenizer(place.tokenizer, "of this preparation")
    sides = [is_validation(text.encode(), place.validation_fraction) for text in texts]
    counts = np.zeros(tokenizer.vocab_size, dtype=np.uint32)

    def split(path: Path, validation: bool, counts: npt.NDArray[np.uint32] | None) -> Split:
        mine = [text for text, side in zip(texts, sides, strict=True) if text and side == validation]
        stream = _token_stream(mine, tokenizer, counts)
        shard = write_shard(path, stream, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash)
        size = sum(len(text.encode()) for text in mine)
        return Split(documents=len(mine), bytes=size, tokens=shard.tokens, shards=[shard])

    train = split(place.train_path, False, counts)
    validation = split(place.validation_path, True, None)
    with atomic_file(place.counts_path) as file:
        np.save(file, counts)
    record = UnitRecord(
        settings_hash=place.settings_hash,
        tokenizer_hash=tokenizer.hash,
        read=len(texts),
        train=train,
        validation=validation,
    )
    with atomic_file(place.record_path) as file:
        file.write(record.model_dump_json().encode())
    return record


def finished_unit(place: UnitPlace, tokenizer: Tokenizer) -> UnitRecord | None:
    """The record of a unit that an earlier call finished with the same settings, its files still whole; else None."""
    try:
        record = UnitRecord.model_validate_json(place.record_path.read_bytes())
        if (record.settings_hash, record.tokenizer_hash) != (place.settings_hash, tokenizer.hash):
            return None
        for path, split in ((place.train_path, record.train), (place.validation_path, record.validation)):
            check_shard(
                path, split.shards[0], vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash, remedy=""
            )
    except (OSError, ValidationError, DataError):
        return None
    return record if place.counts_path.is_file() else None


def _token_stream(
    texts: Sequence[str], tokenizer: Tokenizer, counts: npt.NDArray[np.uint32] | None
) -> Iterator[Tokens]:
    """The ids of each document and its EOS. Adds to `counts`, where there is one, how often each id came."""
    for text in texts:
        ids = np.array([*tokenizer.encode([text])[0], tokenizer.eos_id], dtype=np.int64)
        if counts is not None:
            np.add.at(counts, ids, 1)
        yield ids
