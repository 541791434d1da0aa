"""Token files, manifests and prepared folders. `write_folder` makes a folder of given tokens without a tokenizer."""

import io
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.dataset import PreparedData, file_hash, open_data, open_unchecked
from llmtrain.data.manifest import Baseline, Manifest, Split, load_manifest, tokens_hash
from llmtrain.data.shards import HEADER, TokenFile, token_dtype, write_shard
from llmtrain.errors import DataError

COMMAND = "llmtrain prepare --config configs/some.yaml"


def write_folder(
    folder: Path,
    train: list[np.ndarray],
    validation: np.ndarray,
    *,
    vocab_size: int = 100,
    eos_id: int = 2,
) -> PreparedData:
    """A prepared folder with one train shard for each array; every id but 0 to 2 stands for one byte."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"not a real one")
    tokenizer_hash = file_hash(b"not a real one", 32)
    token_bytes = np.ones(vocab_size, dtype=np.int32)
    token_bytes[:3] = 0
    raw = io.BytesIO()
    np.save(raw, token_bytes)
    (folder / "token_bytes.npy").write_bytes(raw.getvalue())

    def split(arrays: list[np.ndarray], name: str) -> Split:
        shards = [
            write_shard(folder / name.format(i), [array], vocab_size=vocab_size, tokenizer_hash=tokenizer_hash)
            for i, array in enumerate(arrays)
        ]
        count = sum(len(array) for array in arrays)
        return Split(documents=1, bytes=count, tokens=count, shards=shards)

    splits = {"train": split(train, "train-{:06d}.bin"), "validation": split([validation], "validation.bin")}
    same = {"vocab_size": vocab_size, "eos_id": eos_id, "tokenizer_hash": tokenizer_hash, **splits}
    manifest = Manifest(
        llmtrain="0",
        source="a test",
        source_fingerprint="",
        settings={},
        dtype="uint16" if vocab_size <= 65536 else "uint32",
        token_bytes_hash=file_hash(raw.getvalue(), 16),
        uniform=Baseline(perplexity=float(vocab_size), nats_per_byte=1.0),
        unigram=Baseline(perplexity=2.0, nats_per_byte=1.0),
        content_hash=tokens_hash(**same),
        **same,
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return open_data(folder, COMMAND)


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    return write_folder(tmp_path / "d", [np.arange(3, 50), np.arange(0), np.arange(50, 60)], np.arange(20))


def test_tokens_are_read_across_shards(tmp_path: Path) -> None:
    """Else the sample at the border of two shards is wrong."""
    stream = np.random.default_rng(0).integers(0, 100, 1000)
    cuts = np.split(stream, [1, 1, 100, 400, 999])
    data = write_folder(tmp_path, cuts, np.arange(5))
    assert len(data.train) == 1000
    for start, count in [(0, 1000), (0, 1), (0, 0), (1000, 0), (99, 2), (50, 600), (998, 2), (400, 599)]:
        assert np.array_equal(data.train.read(start, count), stream[start : start + count])
    assert np.array_equal(np.concatenate(list(data.train.chunks(7))), stream)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65535, np.uint16), (65536, np.uint16), (65537, np.uint32), (128256, np.uint32)]
)
def test_the_largest_id_survives(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    """Else ids of a large vocabulary wrap around to other tokens."""
    stream = np.array([0, vocab_size - 1, 3])
    data = write_folder(tmp_path, [stream], stream, vocab_size=vocab_size)
    assert token_dtype(vocab_size) == dtype
    assert data.train.read(0, 3).dtype == dtype
    assert data.train.read(0, 3).tolist() == stream.tolist()
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        write_shard(tmp_path / "x", [np.array([vocab_size])], vocab_size=vocab_size, tokenizer_hash="00" * 32)


def _overwrite(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


def test_damaged_folders_are_refused_by_name_with_the_remedy(data: PreparedData) -> None:
    """Else a run trains on what is left of a half-copied shard, or on ids of another tokenizer."""
    shard = data.path / "train-000000.bin"
    whole = shard.read_bytes()
    cases = {
        "is truncated: 156 bytes, wanted 158": lambda: shard.write_bytes(whole[:-2]),
        "is damaged: 160 bytes, wanted 158": lambda: shard.write_bytes(whole + b"xx"),
        "is truncated: 10 bytes, the header alone has 64": lambda: shard.write_bytes(whole[:10]),
        "is not a token file: it begins with b'NUMPYNPY'": lambda: _overwrite(shard, 0, b"NUMPYNPY"),
        "format version is 9, the manifest wants 1": lambda: _overwrite(shard, 8, b"\x09"),
        "bytes per token is 4, the manifest wants 2": lambda: _overwrite(shard, 12, b"\x04"),
        "vocabulary size is 101, the manifest wants 100": lambda: _overwrite(shard, 16, b"\x65"),
        "number of tokens is 46, the manifest wants 47": lambda: _overwrite(shard, 24, b"\x2e"),
        f"tokenizer hash is {'00' * 32}, the manifest wants": lambda: _overwrite(shard, 32, bytes(32)),
        "No such file or directory": lambda: shard.unlink(),
    }
    for message, damage in cases.items():
        damage()
        with pytest.raises(DataError) as caught:
            open_data(data.path, COMMAND)
        assert message in str(caught.value)
        assert str(shard) in str(caught.value)
        assert COMMAND in str(caught.value)
        shard.write_bytes(whole)
    open_data(data.path, COMMAND)


@pytest.mark.parametrize("name", ["tokenizer.model", "token_bytes.npy"])
def test_other_files_are_checked_too(data: PreparedData, name: str) -> None:
    """Else text is decoded, or bytes are counted, with the files of another preparation."""
    _overwrite(data.path / name, 3, b"?")
    with pytest.raises(DataError, match=rf"{name}: hash is .* the manifest wants .*{COMMAND}"):
        open_data(data.path, COMMAND)
    (data.path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: No such file"):
        open_data(data.path, COMMAND)


def test_changed_tokens_are_found_by_verify(data: PreparedData) -> None:
    """Else a flipped bit on disk is never noticed: opening compares only sizes and headers."""
    data.verify(COMMAND)
    _overwrite(data.path / "train-000002.bin", HEADER.size + 4, b"\x01")
    with pytest.raises(DataError, match=r"train-000002\.bin: hash is"):
        open_data(data.path, COMMAND).verify(COMMAND)


def test_a_missing_or_unfinished_folder_names_the_command(tmp_path: Path) -> None:
    """Else the user of a fresh machine does not learn how to get the data."""
    with pytest.raises(DataError, match=f"there is no prepared data at .*nowhere. Prepare it with: {COMMAND}"):
        open_data(tmp_path / "nowhere", COMMAND)
    with pytest.raises(DataError, match=f"not a finished data folder.*{COMMAND}"):
        load_manifest(tmp_path, COMMAND)


@pytest.mark.parametrize("text", ["", "{", '{"format": 2}', "\udcff"])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    """Else a broken JSON file ends in a traceback."""
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=r"manifest\.json is damaged: .*--force"):
        load_manifest(tmp_path)


def test_too_little_text_for_one_sample(data: PreparedData) -> None:
    """Else a long sequence on a small corpus fails deep inside training."""
    assert data.num_samples(56) == 1
    assert data.num_samples(8) == 7
    with pytest.raises(DataError, match=r"has 57 tokens, one sample needs batch.seq_len \+ 1 = 58"):
        data.num_samples(57)


def test_a_vocabulary_larger_than_the_models_is_refused(data: PreparedData) -> None:
    """Else an id without an embedding crashes a GPU kernel."""
    data.manifest.require_fits(100)
    with pytest.raises(DataError, match=r"100 entries, model.vocab_size is 99"):
        data.manifest.require_fits(99)


def test_a_set_of_many_shards_opens_within_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a set of thousands of shards runs out of file descriptors."""
    monkeypatch.setattr("llmtrain.data.shards.limit", lambda: 1024)
    data = write_folder(tmp_path, [np.array([i % 100]) for i in range(1500)], np.arange(5))
    data = open_data(tmp_path)
    assert data.train.read(0, 1500).tolist() == [i % 100 for i in range(1500)]
    assert len(list(Path("/proc/self/fd").iterdir())) < 400


def test_a_shard_that_was_not_looked_at_is_checked_when_it_is_first_read(data: PreparedData) -> None:
    """Else a rank that leaves a file to others trains on what another preparation left in its place."""
    _overwrite(data.path / "train-000002.bin", 32, bytes(32))
    lazy = open_unchecked(data.path, COMMAND)
    assert lazy.train.read(0, 40).tolist() == list(range(3, 43))
    with pytest.raises(DataError, match=rf"train-000002.bin: tokenizer hash is 0000.*{COMMAND}"):
        lazy.train.read(40, 10)


@pytest.mark.parametrize("most", [0, 1, 10])
def test_ranks_together_look_at_every_file_once(data: PreparedData, most: int) -> None:
    """Else a file that is cut short, or not there, is met by a rank after hours of training."""
    ranks = 3
    assert sum(open_unchecked(data.path).check(rank, ranks, most) for rank in range(ranks)) == 4
    whole = {path: path.read_bytes() for path in data.path.glob("*.bin")}
    assert len(whole) == 4
    for path, content in whole.items():
        for damage in (lambda: path.write_bytes(content[:-1]), path.unlink):  # noqa: B023 - called in this turn
            damage()
            refused = 0
            for rank in range(ranks):
                try:
                    open_unchecked(data.path, COMMAND).check(rank, ranks, most)
                except DataError as error:
                    assert str(path) in str(error) and COMMAND in str(error)
                    refused += 1
            assert refused == 1
        path.write_bytes(content)


def test_two_copies_of_a_folder_are_two(data: PreparedData, tmp_path: Path) -> None:
    """Else nodes with copies of their own would each look at a part of them, and miss what is damaged in the rest."""
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    assert data.identity() == open_unchecked(data.path).identity() != open_unchecked(copy).identity()


def test_a_process_may_open_what_the_system_lets_it() -> None:
    """Else a rank among a thousand runs out of connections at the limit a shell starts it with."""
    code = "from llmtrain.descriptors import limit, raise_limit; raise_limit(); print(limit())"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(256, hard)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard)),
    )
    assert int(done.stdout) == hard


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    """Else half a shard carries the name of a whole one."""

    def chunks():
        yield np.arange(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.bin", chunks(), vocab_size=10, tokenizer_hash="00" * 32)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_stream_has_no_tokens(tmp_path: Path) -> None:
    """Else the length of a split without shards is an error."""
    assert len(TokenFile(tmp_path, [], token_dtype(10))) == 0
