import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.config import DataConfig, StdlibSource
from llmtrain.data import prepare as module
from llmtrain.data.dataset import open_data
from llmtrain.data.manifest import Manifest
from llmtrain.data.prepare import prepare
from llmtrain.data.progress import PrepareProgress
from llmtrain.data.sources import SourceSize, documents
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.data.unit import is_validation
from llmtrain.errors import DataError

VOCAB = 400

# Prepares what argv[1], the JSON of a DataConfig, describes, with argv[2] workers.
SCRIPT = """
import sys
from llmtrain.config import DataConfig
from llmtrain.data.prepare import prepare
if __name__ == "__main__":
    prepare(DataConfig.model_validate_json(sys.argv[1]), workers=int(sys.argv[2]), model_vocab_size=400)
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """About 2 MB of real text in a few hundred documents, an empty one among them."""
    whole = islice(documents(StdlibSource(kind="stdlib")), 150)
    chunks = [text[i : i + 8000] for text in whole for i in range(0, len(text), 8000)]
    return [*chunks[:5], "", *chunks[5:300]]


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _config(path: Path, *sources: Path, kind: str = "jsonl", **changes) -> DataConfig:
    return DataConfig.model_validate(
        {
            "path": str(path),
            "source": {"kind": kind, "paths": [str(source) for source in sources]},
            "tokenizer": {"kind": "sentencepiece", "vocab_size": VOCAB, "sample_bytes": 200_000},
            "validation_fraction": 0.05,
            "shard_bytes": 200_000,
            **changes,
        }
    )


def _prepare(config: DataConfig, workers: int = 1, **changes) -> Manifest:
    return prepare(config, workers=workers, **{"model_vocab_size": VOCAB, "seed": 1234, **changes})


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    _prepare(_config(folder, corpus))
    return folder


def test_the_folder_holds_the_text_and_nothing_else(reference: Path, texts: list[str]) -> None:
    """Else text is lost, doubled or out of order, or an EOS is missing between documents."""
    data = open_data(reference)
    data.verify()
    tokenizer = Tokenizer.load(data.tokenizer_path)
    for stream, split, wanted in [
        (data.train, data.manifest.train, [t for t in texts if t and not is_validation(t.encode(), 0.05)]),
        (data.validation, data.manifest.validation, [t for t in texts if is_validation(t.encode(), 0.05)]),
    ]:
        ids = stream.read(0, len(stream)).astype(np.int64)
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        assert ends[-1] == len(ids) - 1
        found = [tokenizer.decode(piece[:-1].tolist()) for piece in np.split(ids, ends[:-1] + 1)]
        assert found == wanted
        assert (split.documents, split.tokens) == (len(wanted), len(ids))
        assert split.bytes == sum(len(text.encode()) for text in wanted) == data.token_bytes[ids].sum()
    assert len(data.manifest.train.shards) > 8
    assert not list(reference.glob(".*"))


def test_the_baselines_are_those_of_a_slow_count(reference: Path) -> None:
    """Else a model that learned nothing looks better than guessing."""
    data = open_data(reference)
    train = data.train.read(0, len(data.train)).tolist()
    scored = data.validation.read(1, len(data.validation) - 1).tolist()
    times = Counter(train)
    nats = -sum(math.log((times[token] + 1) / (len(train) + VOCAB)) for token in scored)
    size = sum(int(data.token_bytes[token]) for token in scored)
    manifest = data.manifest
    assert manifest.uniform.perplexity == VOCAB
    assert manifest.uniform.nats_per_byte == pytest.approx(len(scored) * math.log(VOCAB) / size, rel=1e-12)
    assert manifest.unigram.perplexity == pytest.approx(math.exp(nats / len(scored)), rel=1e-12)
    assert manifest.unigram.nats_per_byte == pytest.approx(nats / size, rel=1e-12)


def test_the_number_of_workers_changes_no_byte(
    reference: Path, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else two people who prepare the same data cannot compare their runs."""
    _prepare(_config(tmp_path / "d", corpus), workers=2)
    assert _files(tmp_path / "d") == _files(reference)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training a tokenizer of 400 pieces on 0.2 MB" in err and "tokenized" in err


def _wait(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_in_the_middle_costs_only_the_unfinished_units(
    reference: Path, corpus: Path, tmp_path: Path, workers: int
) -> None:
    """Else a preparation of days begins again, or goes on with half a shard, or leaves workers behind."""
    config = _config(tmp_path / "d", corpus)
    units = tmp_path / "d" / ".units"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, config.model_dump_json(), str(workers)], stderr=subprocess.DEVNULL
    )
    try:
        _wait(lambda: len([*units.glob("[0-9]*.json")]) >= 3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _wait(lambda: not any(_alive(int(child)) for child in children))
    assert not (tmp_path / "d" / "manifest.json").exists()
    with pytest.raises(DataError, match="not a finished data folder"):
        open_data(tmp_path / "d")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").glob("train-*.bin")}
    finished = {f"train-{path.stem}.bin" for path in units.glob("[0-9]*.json")}
    (tmp_path / "d" / ".train-000099.bin.1.tmp").write_bytes(b"what a kill leaves")
    _prepare(config, workers=workers)
    assert _files(tmp_path / "d") == _files(reference)
    assert all((tmp_path / "d" / name).stat().st_mtime_ns == kept[name] for name in finished)


def test_a_unit_that_is_missing_in_the_middle_is_done_again(
    reference: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill while units finish out of order loses one of them."""
    config = _config(tmp_path / "d", corpus)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            _prepare(config)
    (tmp_path / "d" / ".units" / "000002.json").unlink()
    truncated = tmp_path / "d" / "train-000004.bin"
    truncated.write_bytes(truncated.read_bytes()[:-2])
    _prepare(config)
    assert _files(tmp_path / "d") == _files(reference)


def test_a_finished_folder_is_recognised_at_once(
    reference: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else every start of a script prepares again."""
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    began = time.monotonic()
    manifest = _prepare(_config(reference, corpus))
    assert time.monotonic() - began < 0.5
    assert "is already prepared" in capfd.readouterr().err
    assert manifest == open_data(reference).manifest
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


def test_other_settings_are_refused_and_never_overwrite(corpus: Path, tmp_path: Path) -> None:
    """Else a changed config silently trains on the old tokens, or destroys them."""
    small = tmp_path / "small.jsonl"
    small.write_bytes(b"".join(corpus.read_bytes().splitlines(keepends=True)[:60]))
    config = _config(tmp_path / "d", small)
    _prepare(config)
    before = _files(tmp_path / "d")
    other = _config(tmp_path / "d", small, validation_fraction=0.2)
    with pytest.raises(DataError, match=r"data\.validation_fraction: 0\.05 there, 0\.2 now.*--force"):
        _prepare(other)
    assert _files(tmp_path / "d") == before
    _prepare(other, force=True)
    assert open_data(tmp_path / "d").manifest.settings["validation_fraction"] == 0.2
    _prepare(config, force=True)
    assert _files(tmp_path / "d") == before


def test_a_begun_folder_is_not_continued_on_other_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one folder holds the tokens of two corpora."""
    source = tmp_path / "c.jsonl"
    source.write_bytes(corpus.read_bytes())
    config = _config(tmp_path / "d", source)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            _prepare(config)
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"data\.source files: '.*' there, '.*' now"):
        _prepare(config)


def test_a_corrected_mistake_is_no_other_preparation(corpus: Path, tmp_path: Path) -> None:
    """Else a misspelt column, found before anything was written, demands --force."""
    wrong = {"kind": "jsonl", "paths": [str(corpus)], "text": "txt"}
    with pytest.raises(DataError, match=r'names "txt"'):
        _prepare(_config(tmp_path / "d", source=wrong))
    _prepare(_config(tmp_path / "d", corpus))


def test_foreign_files_are_not_taken_for_ours(corpus: Path, tmp_path: Path) -> None:
    """Else a tokenizer that happens to lie there is used instead of the one asked for."""
    (tmp_path / "tokenizer.model").write_bytes(b"somebody's")
    with pytest.raises(DataError, match=r"files of an unknown preparation, tokenizer\.model among them"):
        _prepare(_config(tmp_path, corpus))
    assert (tmp_path / "tokenizer.model").read_bytes() == b"somebody's"


def test_two_at_once_are_told_apart(corpus: Path, tmp_path: Path) -> None:
    """Else two preparations write into one folder."""
    with (
        module._only_one(tmp_path / "d"),
        pytest.raises(DataError, match="is being prepared by another process"),
    ):
        _prepare(_config(tmp_path / "d", corpus))


def test_every_local_kind_gives_the_same_tokens(reference: Path, texts: list[str], tmp_path: Path) -> None:
    """Else how a corpus is packed changes what is trained on."""
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "texts" / f"{index:04}.txt").write_bytes(text.encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    wanted = open_data(reference).manifest.content_hash
    for kind, source in (("text", "texts"), ("parquet", "a.parquet")):
        assert _prepare(_config(tmp_path / kind, tmp_path / source, kind=kind)).content_hash == wanted


def test_a_given_tokenizer_is_used_as_it_is(reference: Path, corpus: Path, tmp_path: Path) -> None:
    """Else a run cannot share the vocabulary of another."""
    model = reference / "tokenizer.model"
    given = {"kind": "model", "path": str(model)}
    manifest = _prepare(_config(tmp_path / "d", corpus, tokenizer=given))
    assert manifest.content_hash == open_data(reference).manifest.content_hash
    assert (tmp_path / "d" / "tokenizer.model").read_bytes() == model.read_bytes()
    with pytest.raises(DataError, match=r"vocabulary has 400 entries, model\.vocab_size is 399"):
        _prepare(_config(tmp_path / "e", corpus, tokenizer=given), model_vocab_size=399)


def test_a_vocabulary_larger_than_the_models_is_refused_before_anything_is_done(corpus: Path, tmp_path: Path) -> None:
    """Else hours of preparation end in tokens that the model cannot take."""
    with pytest.raises(DataError, match=r"400 entries, model\.vocab_size is 300"):
        _prepare(_config(tmp_path / "d", corpus), model_vocab_size=300)
    assert not (tmp_path / "d").exists()


def test_an_empty_split_says_which_way_to_turn(texts: list[str], tmp_path: Path) -> None:
    """Else a small corpus has no validation perplexity, or the next try is refused for its settings."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:30]))
    with pytest.raises(DataError, match=r"none of the 29 documents .* raise data\.validation_fraction \(now 1e-09\)"):
        _prepare(_config(tmp_path / "d", tmp_path / "a.jsonl", validation_fraction=1e-9))
    with pytest.raises(DataError, match=r"all 29 documents .* lower data\.validation_fraction"):
        _prepare(_config(tmp_path / "d", tmp_path / "a.jsonl", validation_fraction=1 - 1e-9))
    _prepare(_config(tmp_path / "d", tmp_path / "a.jsonl", validation_fraction=0.3))
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    given = {"kind": "model", "path": str(tmp_path / "d" / "tokenizer.model")}
    with pytest.raises(DataError, match="holds no text"):
        _prepare(_config(tmp_path / "e", tmp_path / "b.jsonl", tokenizer=given))


def test_a_worker_that_dies_is_noticed(corpus: Path, tmp_path: Path) -> None:
    """Else a worker killed for its memory leaves the preparation waiting for ever."""
    config = _config(tmp_path / "d", corpus)
    script = SCRIPT.replace("    prepare(", "    from llmtrain.errors import DataError\n    try: prepare(").rstrip()
    script += "\n    except DataError as error: sys.exit(f'told: {error}')\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json(), "2"], stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    _wait(lambda: bool([*(tmp_path / "d" / ".units").glob("[0-9]*.json")]))
    workers = [int(pid) for pid in children.read_text().split() if "spawn_main" in _command(int(pid))]
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "told: a worker process died" in err and "Traceback" not in err


def test_a_worker_that_dies_while_text_is_sent_to_it_is_noticed() -> None:
    """Else the preparation waits for ever for a worker to read what it was being sent."""
    script = """
import multiprocessing
from llmtrain.data.workers import unit_pool
from llmtrain.errors import DataError

try:
    with unit_pool(2) as submit:
        futures = [submit(None, ["x" * 5_000_000]) for _ in range(3)]  # more than a pipe holds
        multiprocessing.active_children()[0].kill()
        futures[0].result()
except DataError as error:
    print(f"told: {error}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("told: a worker process died")


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_progress_tells_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody knows whether a preparation takes an hour or a month."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = PrepareProgress(SourceSize(bytes=100_000_000))
    progress.advance(20_000_000, 5, kept=True)
    assert progress.line() == "20.0 MB, 5 documents"
    now[0] += 10
    progress.advance(40_000_000, 10)
    assert progress.line() == "60.0 MB, 15 documents, 4.0 MB/s, ETA 0:00:10"
    unknown = PrepareProgress(SourceSize())
    unknown.advance(1_000_000, 1)
    assert "ETA" not in unknown.line()


def test_progress_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a terminal scrolls away under lines."""
    drawn = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", drawn)
    with PrepareProgress(SourceSize(documents=2)) as progress:
        progress.advance(1_000_000, 1)
        progress.advance(1_000_000, 1)
    assert "tokenized 2.0 MB, 2 documents" in drawn.getvalue()
