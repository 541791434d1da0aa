import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.config import FileSource, HfSource, StdlibSource
from llmtrain.data.sources import describe, documents, fingerprint, source_size
from llmtrain.errors import DataError

TEXTS = ["first", "zwei\nZeilen  ", "", "三\r\n\ttab", "  five 🙂 \u2028 \x85 \x0c \x1c end"]


def _source(kind: str, *paths: Path | str, text: str = "text") -> FileSource:
    return FileSource(kind=kind, paths=[str(path) for path in paths], text=text)


def _write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    rows = [{key: text, **({"extra": [i]} if i % 2 else {"meta": {"a": i}})} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _every_local_kind(folder: Path) -> dict[str, FileSource]:
    (folder / "texts" / "sub").mkdir(parents=True)
    for name, text in zip(["a.txt", "b", "c.md", "sub/a.txt", "z.txt"], TEXTS, strict=True):
        (folder / "texts" / name).write_bytes(text.encode())
    (folder / "texts" / ".hidden").write_text("not me")
    _write_jsonl(folder / "a.jsonl", TEXTS[:2])
    _write_jsonl(folder / "b.jsonl", TEXTS[2:])
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": [*range(5)]}), folder / "a.parquet")
    return {
        "text": _source("text", folder / "texts"),
        "jsonl": _source("jsonl", folder / "*.jsonl"),
        "parquet": _source("parquet", folder),
    }


def test_every_local_kind_gives_its_documents_in_order_from_anywhere(tmp_path: Path) -> None:
    """Else text is lost or changed on its way in, or a continued preparation repeats documents."""
    for source in _every_local_kind(tmp_path).values():
        assert list(documents(source)) == TEXTS
        for skip in range(7):
            assert list(documents(source, skip)) == TEXTS[skip:]


def test_sizes_tell_the_progress_bar_what_is_to_come(tmp_path: Path) -> None:
    """Else a preparation of days shows no ETA."""
    sources = _every_local_kind(tmp_path)
    assert source_size(sources["text"]).documents == 5
    assert source_size(sources["text"]).bytes == sum(len(text.encode()) for text in TEXTS)
    assert source_size(sources["jsonl"]).bytes == sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    assert source_size(sources["parquet"]).documents == 5


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    """Else a preparation is continued on other text than it was begun on."""
    source = _every_local_kind(tmp_path)["text"]
    before = fingerprint(source)
    os.utime(tmp_path / "texts" / "b")
    assert fingerprint(source) == before
    (tmp_path / "texts" / "b").write_text("longer than it was")
    changed = fingerprint(source)
    (tmp_path / "texts" / "b").rename(tmp_path / "texts" / "bb")
    assert len({before, changed, fingerprint(source)}) == 3


def test_compressed_jsonl_is_read(tmp_path: Path) -> None:
    """Else the form in which most corpora are published has to be unpacked first."""
    plain = _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    source = _source("jsonl", tmp_path / "b.jsonl.gz")
    assert list(documents(source)) == TEXTS
    assert source_size(source).bytes is None


def test_stdlib_is_real_text_without_other_peoples_packages() -> None:
    """Else the demo needs a download, or depends on what is installed beside it."""
    source = StdlibSource(kind="stdlib")
    texts = list(documents(source))
    assert sum(len(text.encode()) for text in texts) > 8_000_000
    assert texts == list(documents(source))
    size = source_size(source)
    assert size.documents is not None and size.documents < 5000
    assert describe(source).startswith("standard library of Python 3.")


def test_missing_files_say_what_is_there(tmp_path: Path) -> None:
    """Else a misspelt path ends in a traceback, or in an empty corpus."""
    _write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    with pytest.raises(DataError, match=r'no file or folder ".*corpsu\.jsonl".*did you mean "corpus\.jsonl"\?'):
        list(documents(_source("jsonl", tmp_path / "corpsu.jsonl")))
    with pytest.raises(DataError, match=r'no file matches ".*\*\.json"'):
        list(documents(_source("jsonl", tmp_path / "*.json")))
    with pytest.raises(DataError, match=r"holds no files named \*\.parquet"):
        list(documents(_source("parquet", tmp_path)))
    with pytest.raises(DataError, match=r"corpus\.jsonl is given twice"):
        list(documents(_source("jsonl", tmp_path, tmp_path / "corpus.jsonl")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": oops', r"a\.jsonl, line 2: not JSON"),
        ("[1]", r"a\.jsonl, line 2: list found, wanted an object"),
        ('{"txt": "a"}', r'line 2: data\.source\.text names "text", which is not there; did you mean "txt"\?'),
        ('{"text": 5}', r'line 2: column "text" holds int, wanted text'),
        ('{"text": "\\ud800"}', r"line 2: the text has no UTF-8 form"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    """Else one bad line among millions cannot be found."""
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(documents(_source("jsonl", tmp_path)))


def test_blank_lines_and_null_texts_are_no_text(tmp_path: Path) -> None:
    """Else a trailing newline, or a row without text, stops a preparation."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": null}\n{"text": "b"}\n\n')
    assert list(documents(_source("jsonl", tmp_path))) == ["a", "", "b"]


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    """Else a damaged or foreign file ends in a traceback of a library."""
    (tmp_path / "a.parquet").write_text("nope")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: "):
        list(documents(_source("parquet", tmp_path)))
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 text: .* at byte 3"):
        list(documents(_source("text", tmp_path / "b.txt")))
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 text|cannot read .*b\.txt"):
        list(documents(_source("jsonl", tmp_path / "b.txt")))


def test_a_missing_column_of_a_table_is_named(tmp_path: Path) -> None:
    """Else a set whose text column is called otherwise ends in a traceback."""
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS, "n": [*range(5)]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'data\.source\.text names "contents".*did you mean "content"\?'):
        list(documents(_source("parquet", tmp_path, text="contents")))
    with pytest.raises(DataError, match='column "n" holds int, wanted text'):
        list(documents(_source("parquet", tmp_path, text="n")))


def test_the_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a compute node without network ends in a page of a client's retries."""
    import datasets

    def unreachable(*args, **kwargs):
        assert kwargs["streaming"]
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    source = HfSource(kind="hf", name="some/set", subset="s")
    with pytest.raises(DataError, match=r'data set "some/set".*Couldn\'t reach the Hub\. .*login node'):
        list(documents(source))


def test_hub_rows_are_streamed_from_where_they_were_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a continued preparation of a hub set repeats or loses documents."""
    import datasets

    rows = datasets.Dataset.from_dict({"body": TEXTS, "n": [*range(5)]}).to_iterable_dataset()
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HfSource(kind="hf", name="some/set", subset="s", text="body", revision="v1")
    assert list(documents(source)) == TEXTS
    assert list(documents(source, 3)) == TEXTS[3:]
    assert calls[0] == (("some/set", "s"), {"split": "train", "revision": "v1", "streaming": True})
    with pytest.raises(DataError, match='names "text", which is not there'):
        list(documents(HfSource(kind="hf", name="some/set")))
    assert source_size(source).documents is None
    assert describe(source) == "Hugging Face some/set s train v1"
