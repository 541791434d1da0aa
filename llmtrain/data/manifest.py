"""What is in a prepared folder? `manifest.json`: counts, hashes, and the perplexities that need no model.

It is written last, so a folder that has one is complete. The baselines are measured on what validation scores, every
token of the validation split but the first: uniform is 1/vocab_size for each, unigram the add-one frequencies of the
train split. Perplexity = exp(nats per token).
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from llmtrain.config import content_hash
from llmtrain.data.shards import Shard
from llmtrain.errors import DataError

FILE = "manifest.json"
PREPARE_COMMAND = "llmtrain prepare --config CONFIG"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Split(_Strict):
    """Train or validation: `bytes` counts its text in UTF-8, `tokens` also one EOS for every document."""

    documents: NonNegativeInt
    bytes: NonNegativeInt
    tokens: NonNegativeInt
    shards: list[Shard]


class Baseline(_Strict):
    """What a predictor that never looks at the context reaches on the validation split."""

    perplexity: float
    nats_per_byte: float


class Manifest(_Strict):
    """A prepared folder."""

    format: Literal[1] = 1
    llmtrain: str
    source: str
    source_fingerprint: str
    settings: dict[str, Any]
    vocab_size: PositiveInt
    eos_id: NonNegativeInt
    dtype: Literal["uint16", "uint32"]
    tokenizer_hash: str
    token_bytes_hash: str
    train: Split
    validation: Split
    uniform: Baseline
    unigram: Baseline
    content_hash: str

    @property
    def validation_hash(self) -> str:
        """Names the validation split: equal where the same tokens are scored."""
        return content_hash([self.tokenizer_hash, [shard.hash for shard in self.validation.shards]])

    def require_fits(self, model_vocab_size: int) -> None:
        """Raise DataError where the model has no embedding for some of the ids."""
        require_fits(self.vocab_size, model_vocab_size, "the prepared tokens'")


def require_fits(vocab_size: int, model_vocab_size: int, whose: str) -> None:
    """Raise DataError where a vocabulary is larger than the model's."""
    if vocab_size > model_vocab_size:
        raise DataError(
            f"{whose} vocabulary has {vocab_size} entries, model.vocab_size is {model_vocab_size}: "
            f"set model.vocab_size to {vocab_size} or more, or use a smaller tokenizer"
        )


def tokens_hash(*, vocab_size: int, eos_id: int, tokenizer_hash: str, train: Split, validation: Split) -> str:
    """The content hash: it covers everything that decides which tokens a run sees, and nothing else."""
    shards = [[[shard.tokens, shard.hash] for shard in split.shards] for split in (train, validation)]
    return content_hash(["llmtrain tokens 1", vocab_size, eos_id, tokenizer_hash, shards])


def load_manifest(path: str | Path, command: str = PREPARE_COMMAND) -> Manifest:
    """Read the manifest of the prepared folder `path`. Raises DataError naming `command` where there is none."""
    file = Path(path) / FILE
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        if Path(path).is_dir():
            missing = f"{path} is not a finished data folder: {FILE}: {error.strerror}"
        else:
            missing = f"there is no prepared data at {path}"
        raise DataError(f"{missing}. Prepare it with: {command}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is damaged: not UTF-8 text. Prepare it anew with: {command} --force") from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in fault["loc"])
        message = f"{where}: {fault['msg']}" if where else fault["msg"]
        raise DataError(f"{file} is damaged: {message}. Prepare it anew with: {command} --force") from None
