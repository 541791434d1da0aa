import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from llmtrain.config import StdlibSource, TrainedTokenizer
from llmtrain.data import tokenizer as module
from llmtrain.data.sources import documents
from llmtrain.data.tokenizer import Tokenizer, available_ram, estimated_ram, sample_documents, train_tokenizer
from llmtrain.errors import DataError

HARD = ["", " ", "  lead", "trail  ", "a\n\n\tb\r\n", "é你🙂\ufeff", "</s><s><unk>", "a\0b", "123 4567", "<0x41>"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(islice(documents(StdlibSource(kind="stdlib")), 60))


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(texts, TrainedTokenizer(kind="sentencepiece", vocab_size=600)), "trained")


def test_no_text_is_lost_and_bytes_add_up(trained: Tokenizer, texts: list[str]) -> None:
    """Else nats per byte is wrong, and runs with different tokenizers cannot be compared."""
    counts = trained.token_bytes()
    assert len(counts) == trained.vocab_size == 600
    assert counts[trained.eos_id] == 0
    for text, ids in zip([*HARD, *texts], trained.encode([*HARD, *texts]), strict=True):
        assert trained.decode(ids) == text
        assert counts[np.array(ids, dtype=int)].sum() == len(text.encode())
        assert trained.eos_id not in ids


def test_indentation_and_digits_are_tokens_of_their_own(trained: Tokenizer) -> None:
    """Else source code costs a token a space, and numbers are cut at random."""
    assert len(trained.encode(["        "])[0]) <= 2
    assert len(trained.encode(["2048"])[0]) == 4


def test_training_is_deterministic_and_silent(
    trained: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else two machines make different tokens of the same text, or pages of a library's log hide ours."""
    config = TrainedTokenizer(kind="sentencepiece", vocab_size=600)
    assert train_tokenizer(texts, config) == trained.proto
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(module, "_THREADS", 1)
    alone = Tokenizer(train_tokenizer(texts, config), "alone")
    pieces = [[t._model.id_to_piece(i) for i in range(600)] for t in (trained, alone)]
    assert pieces[0] == pieces[1]


def test_the_sample_is_uniform_reproducible_and_within_its_budget() -> None:
    """Else the vocabulary is that of the first files, or memory overflows."""
    texts = [f"{i:010}" for i in range(2000)]
    kept = sample_documents(texts, 1000, 1, None)
    assert kept == sample_documents(texts, 1000, 1, None) == sorted(kept)
    assert kept != sample_documents(texts, 1000, 2, None)
    assert len(kept) == 100
    assert 700 < np.mean([int(text) for text in kept]) < 1300
    assert sample_documents(texts, 10**9, 1, None) == texts
    assert sample_documents(["a" * 50], 10, 1, None) == ["a" * 50]


def test_the_sample_of_an_endless_source_ends() -> None:
    """Else a hub set of terabytes is read twice."""

    def endless():
        while True:
            yield "0123456789"

    assert len(sample_documents(endless(), 100, 1, None)) == 10


def test_a_sample_larger_than_memory_is_refused() -> None:
    """Else the kernel kills the preparation after an hour."""
    with pytest.raises(DataError, match=r"needs about 0\.2 GB of memory, 0\.3 GB are .* lower .*sample_bytes \(now"):
        sample_documents(["x" * 1_000_000] * 9, 10**9, 1, 300_000_000)
    assert estimated_ram(200_000_000) == 3_400_000_000
    assert (available_ram() or 0) > 10**8


def test_training_stays_within_the_estimate() -> None:
    """Else the check against the available memory promises too much."""
    code = """
import resource
from llmtrain.config import StdlibSource, TrainedTokenizer
from llmtrain.data.sources import documents
from llmtrain.data.tokenizer import estimated_ram, sample_documents, train_tokenizer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
texts = sample_documents(documents(StdlibSource(kind="stdlib")), 6_000_000, 1, None)
before = peak()
train_tokenizer(texts, TrainedTokenizer(kind="sentencepiece", vocab_size=1000))
print(peak() - before, estimated_ram(sum(len(text.encode()) for text in texts)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, estimated = map(int, run.stdout.split())
    assert used < estimated


def test_too_little_text_for_the_vocabulary_is_one_line() -> None:
    """Else a small corpus ends in a C++ message without advice."""
    with pytest.raises(DataError, match=r"11 characters .* few .* of 5000 pieces: .*vocab_size to \d+ or less"):
        train_tokenizer(["hello\nworld"], TrainedTokenizer(kind="sentencepiece", vocab_size=5000))


@pytest.mark.parametrize("raw", [b"", b"not a model", b"\x0a\xff\xff\xff"])
def test_a_broken_model_is_named(tmp_path: Path, raw: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Else a damaged file crashes the process or encodes nonsense."""
    path = tmp_path / "x.model"
    with pytest.raises(DataError, match=r"cannot read tokenizer .*x\.model: No such file"):
        Tokenizer.load(path)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.model is (empty|not a SentencePiece model)"):
        Tokenizer.load(path)


def test_a_model_that_loses_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    """Else perplexity is of a text from which the hard part is gone."""
    for name, options, message in [
        ("a", {"byte_fallback": False}, "has no byte fallback"),
        ("b", {"byte_fallback": True, "eos_id": -1}, "has no end-of-sequence"),
    ]:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[5].split("\n")),
            model_prefix=str(tmp_path / name),
            vocab_size=400,
            model_type="bpe",
            minloglevel=2,
            **options,
        )
        with pytest.raises(DataError, match=message):
            Tokenizer.load(tmp_path / f"{name}.model")
