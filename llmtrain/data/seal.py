"""How does a folder whose units are all done become a finished one? Join, measure the baselines, write the manifest."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain import __version__
from llmtrain.config import DataConfig
from llmtrain.data.dataset import TOKEN_BYTES_FILE, TokenBytes, file_hash
from llmtrain.data.manifest import FILE, Baseline, Manifest, Split, tokens_hash
from llmtrain.data.shards import TokenFile, atomic_file, token_dtype, write_shard
from llmtrain.data.sources import describe
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.data.unit import UNITS_FOLDER, UnitRecord
from llmtrain.errors import DataError

VALIDATION_FILE = "validation.bin"


def seal(
    config: DataConfig,
    folder: Path,
    tokenizer: Tokenizer,
    records: list[UnitRecord],
    settings: dict[str, Any],
    source_fingerprint: str,
) -> Manifest:
    """Write validation.bin, token_bytes.npy and manifest.json. Raises DataError where a split came out empty."""
    train, parts = _join([record.train for record in records]), _join([record.validation for record in records])
    _require_both(train, parts, config.validation_fraction)
    dtype = token_dtype(tokenizer.vocab_size)
    stream = TokenFile(folder / UNITS_FOLDER, parts.shards, dtype).chunks()
    shard = write_shard(
        folder / VALIDATION_FILE, stream, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash
    )
    validation = parts.model_copy(update={"shards": [shard]})
    token_bytes = tokenizer.token_bytes()
    raw = io.BytesIO()
    np.save(raw, token_bytes)
    _write(folder / TOKEN_BYTES_FILE, raw.getvalue())
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for index in range(len(records)):
        counts += np.load(folder / UNITS_FOLDER / f"{index:06d}.counts.npy", allow_pickle=False)
    uniform, unigram = baselines(counts, TokenFile(folder, [shard], dtype), token_bytes)
    manifest = Manifest(
        llmtrain=__version__,
        source=describe(config.source),
        source_fingerprint=source_fingerprint,
        settings=settings,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        tokenizer_hash=tokenizer.hash,
        token_bytes_hash=file_hash(raw.getvalue(), 16),
        train=train,
        validation=validation,
        uniform=uniform,
        unigram=unigram,
        content_hash=tokens_hash(
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_hash=tokenizer.hash,
            train=train,
            validation=validation,
        ),
    )
    _write(folder / FILE, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def baselines(
    train_counts: npt.NDArray[np.int64], validation: TokenFile, token_bytes: TokenBytes
) -> tuple[Baseline, Baseline]:
    """Uniform and unigram (add-one) on every token of `validation` but the first."""
    seen = np.zeros(len(train_counts), dtype=np.int64)
    for chunk in validation.chunks():
        seen += np.bincount(chunk, minlength=len(seen))
    seen[validation.read(0, 1)[0]] -= 1
    tokens, size = int(seen.sum()), int(seen @ token_bytes)
    nats = np.log(train_counts.sum() + len(train_counts)) - np.log(train_counts + 1.0)

    unigram = float(seen @ nats)
    return (
        Baseline(perplexity=float(len(seen)), nats_per_byte=tokens * math.log(len(seen)) / max(1, size)),
        Baseline(perplexity=math.exp(unigram / tokens), nats_per_byte=unigram / max(1, size)),
    )


def _join(splits: list[Split]) -> Split:
    return Split(
        documents=sum(split.documents for split in splits),
        bytes=sum(split.bytes for split in splits),
        tokens=sum(split.tokens for split in splits),
        shards=[shard for split in splits for shard in split.shards],
    )


def _require_both(train: Split, validation: Split, fraction: float) -> None:
    total = train.documents + validation.documents
    if not total:
        raise DataError("data.source holds no text")
    if validation.tokens < 2:
        raise DataError(
            f"none of the {total} documents fell into validation: raise data.validation_fraction (now {fraction:g}), "
            f"to about {min(0.5, max(0.05, 10 / total)):.1g} for so few"
        )
    if train.tokens < 2:
        raise DataError(f"all {total} documents fell into validation: lower data.validation_fraction ({fraction:g})")


def _write(path: Path, raw: bytes) -> None:
    with atomic_file(path) as file:
        file.write(raw)
