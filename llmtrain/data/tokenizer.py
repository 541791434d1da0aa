"""Which ids does a text become? SentencePiece BPE with byte fallback: no text is lost, and bytes can be counted.

A trained model keeps text as it is (identity normalisation, no dummy prefix, no stripping), so that the bytes of a
document's tokens add up to its UTF-8 length. One character is SentencePiece's own: U+2581 in a text reads as a space.
A given model keeps its own rules; one that adds a prefix space counts one byte more for each document.

Training is a function of the sampled text alone, so the same corpus and seed give the same file on every machine.
"""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from llmtrain.config import TrainedTokenizer
from llmtrain.data.dataset import TokenBytes, file_hash
from llmtrain.errors import DataError

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_SAMPLE_SPAN = 20  # the sample is drawn from the first sample_bytes * 20 of text: a hub set is not read twice
_RAM_PER_BYTE = 16  # of sample: 11 to 15 measured on 30 to 200 MB of source code
_RAM_BASE = 200_000_000
_RAM_SHARE = 0.7
_THREADS = 4  # the count is written into the model file, so it must not depend on the machine

sentencepiece.set_min_log_level(2)


class Tokenizer:
    """A SentencePiece model. `where` names it in errors."""

    def __init__(self, proto: bytes, where: str) -> None:
        if not proto:
            raise DataError(f"tokenizer {where} is empty")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"tokenizer {where} is not a SentencePiece model, or is damaged: {error}") from None
        self.proto = proto
        self.hash = file_hash(proto, 32)
        self.vocab_size = int(self._model.get_piece_size())
        self.eos_id = int(self._model.eos_id())
        if self.eos_id < 0:
            raise DataError(f"tokenizer {where} has no end-of-sequence piece: train it with an eos_id")
        if not any(self._model.is_byte(token) for token in range(self.vocab_size)):
            raise DataError(
                f"tokenizer {where} has no byte fallback, so text it does not know would vanish: "
                "train it with byte_fallback"
            )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `.model` file. Raises DataError where it is missing or damaged."""
        try:
            proto = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from None
        return cls(proto, str(path))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without BOS or EOS."""
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens are silent."""
        text: str = self._model.decode([int(token) for token in ids])
        return text

    def token_bytes(self) -> TokenBytes:
        """Bytes of text each id stands for: its piece in UTF-8 with plain spaces, 1 for a byte, 0 for control."""
        model = self._model
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for token in range(self.vocab_size):
            if model.is_byte(token):
                counts[token] = 1
            elif not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token)):
                counts[token] = len(model.id_to_piece(token).replace(_SPACE, " ").encode())
        return counts


def sample_documents(texts: Iterable[str], sample_bytes: int, seed: int, ram: int | None) -> list[str]:
    """A uniform sample of the documents, at most `sample_bytes` of text, in their order.

    Each document draws a number; those with the smallest are kept while they fit. Raises DataError as soon as the
    sample has more than can be trained on in `ram` bytes of memory.
    """
    draw = random.Random(seed)
    kept: list[tuple[float, int, str, int]] = []  # a heap, largest draw on top
    total = seen = 0
    for index, text in enumerate(texts):
        size = len(text.encode())
        heapq.heappush(kept, (-draw.random(), index, text, size))
        total += size
        seen += size
        while total > sample_bytes and len(kept) > 1:
            total -= heapq.heappop(kept)[3]
        if ram is not None and estimated_ram(total) > _RAM_SHARE * ram:
            raise DataError(
                f"training the tokenizer on {total / 1e6:.0f} MB of text needs about {estimated_ram(total) / 1e9:.1f} "
                f"GB of memory, {ram / 1e9:.1f} GB are available: lower data.tokenizer.sample_bytes "
                f"(now {sample_bytes}) to {max(1, int((_RAM_SHARE * ram - _RAM_BASE) / _RAM_PER_BYTE))} or less"
            )
        if seen >= sample_bytes * _SAMPLE_SPAN:
            break
    return [text for _, _, text, _ in sorted(kept, key=lambda entry: entry[1])]


def train_tokenizer(texts: Sequence[str], config: TrainedTokenizer) -> bytes:
    """Train a model on the lines of `texts`, indentation kept; its file's content."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        limit = re.search(r"a value <= (\d+)", str(error))
        advice = f"to {limit[1]} or less" if limit else f"({str(error).strip().splitlines()[-1]})"
        raise DataError(
            f"{sum(map(len, texts))} characters of text are too few for a tokenizer of {config.vocab_size} pieces: "
            f"lower data.tokenizer.vocab_size {advice}, or give more text"
        ) from None
    return model.getvalue()


def estimated_ram(sample_bytes: int) -> int:
    """Memory that training on so much text takes, in bytes."""
    return _RAM_BASE + _RAM_PER_BYTE * sample_bytes


def available_ram() -> int | None:
    """Memory this process may still take, in bytes: of the machine, or of its control group where that has less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().splitlines()[-1].split("::/")[-1]
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        return free


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)
