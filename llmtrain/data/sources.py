"""Which documents does a source hold, and in which order? The order is fixed, so a preparation can be continued.

A document is one row (`hf`, `jsonl`, `parquet`) or one file (`text`, `stdlib`). A row whose text is null is an empty
document. `datasets` is imported only when a source needs it: training never does. Errors name the file and the line.
"""

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmtrain.config import FileSource, HfSource, Source, StdlibSource
from llmtrain.errors import DataError, did_you_mean

_SUFFIXES = {
    "text": ("",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json"),
    "parquet": (".parquet",),
}


@dataclass(frozen=True)
class SourceSize:
    """How much a source holds, as far as it can be told without reading it. Bytes are those of its files."""

    documents: int | None = None
    bytes: int | None = None


def documents(source: Source, skip: int = 0) -> Iterator[str]:
    """The documents of `source` in their order, without the first `skip`. Raises DataError where one is unreadable."""
    if isinstance(source, HfSource):
        return _hub_documents(source, skip)
    readers: dict[str, Callable[[Any], Iterator[str]]] = {
        "stdlib": _stdlib_documents,
        "text": _text_documents,
        "jsonl": _jsonl_documents,
        "parquet": _parquet_documents,
    }
    return islice(readers[source.kind](source), skip, None)


def describe(source: Source) -> str:
    """The source in a few words."""
    if isinstance(source, HfSource):
        parts = [source.name, source.subset, source.split, source.revision]
        return "Hugging Face " + " ".join(part for part in parts if part)
    if isinstance(source, StdlibSource):
        return f"standard library of Python {platform.python_version()}"
    return f"{source.kind} {' '.join(source.paths)}"


def fingerprint(source: Source) -> str:
    """Changes when files are added, removed, renamed or resized. Empty for the hub, where `revision` is the pin."""
    if isinstance(source, HfSource):
        return ""
    files = _stdlib_files() if isinstance(source, StdlibSource) else source_files(source)
    listing = json.dumps([[name, path.stat().st_size] for name, path in files])
    return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()


def source_size(source: Source) -> SourceSize:
    """What a progress bar can count towards."""
    if isinstance(source, HfSource):
        splits = _hub_dataset(source).info.splits or {}
        return SourceSize(documents=splits[source.split].num_examples if source.split in splits else None)
    files = _stdlib_files() if isinstance(source, StdlibSource) else source_files(source)
    if source.kind in ("text", "stdlib"):
        return SourceSize(documents=len(files), bytes=sum(path.stat().st_size for _, path in files))
    if source.kind == "parquet":
        import pyarrow.parquet

        with _readable(str(files[0][1])):
            return SourceSize(documents=sum(pyarrow.parquet.read_metadata(path).num_rows for _, path in files))
    compressed = any(path.suffix in (".gz", ".zst") for _, path in files)
    return SourceSize(bytes=None if compressed else sum(path.stat().st_size for _, path in files))


def source_files(source: FileSource) -> list[tuple[str, Path]]:
    """Every file of a local source with its name inside the folder searched, in the order they are read."""
    found: list[tuple[str, Path]] = []
    for entry in source.paths:
        path = Path(entry).expanduser()
        if path.is_dir():
            here = _folder_files(path, _SUFFIXES[source.kind])
            wanted = "" if source.kind == "text" else f" named *{' or *'.join(_SUFFIXES[source.kind])}"
            complaint = f'data.source.paths: folder "{entry}" holds no files{wanted}'
        elif path.is_file():
            here, complaint = [(path.name, path)], ""
        elif glob.has_magic(entry):
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207, Path.glob has no absolute patterns
            here = [(match.name, match) for match in matches if match.is_file()]
            complaint = f'data.source.paths: no file matches "{entry}" (from {Path.cwd()})'
        else:
            near = did_you_mean(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
            here, complaint = [], f'data.source.paths: there is no file or folder "{entry}" (from {Path.cwd()}){near}'
        if not here:
            raise DataError(complaint)
        found += here
    seen: set[Path] = set()
    for _, path in found:
        if path.resolve() in seen:
            raise DataError(f"data.source.paths: {path} is given twice; its documents would count double")
        seen.add(path.resolve())
    return found


def _folder_files(folder: Path, suffixes: tuple[str, ...], ignored: Set[str] = frozenset()) -> list[tuple[str, Path]]:
    """Visible files below `folder` in name order, without the folders named in `ignored`."""
    names = []
    for here, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".") and name not in ignored]
        prefix = Path(here).relative_to(folder)
        names += [(prefix / name).as_posix() for name in files if not name.startswith(".") and name.endswith(suffixes)]
    return [(name, folder / name) for name in sorted(names)]


def _text_documents(source: FileSource) -> Iterator[str]:
    for _, path in source_files(source):
        with _readable(str(path)):
            yield path.read_bytes().decode("utf-8")


def _stdlib_files() -> list[tuple[str, Path]]:
    ignored = frozenset({"site-packages", "dist-packages", "__pycache__"})
    return _folder_files(Path(sysconfig.get_path("stdlib")), (".py",), ignored)


def _stdlib_documents(source: StdlibSource) -> Iterator[str]:
    for _, path in _stdlib_files():
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # some of its own tests are in other encodings on purpose
        yield text


def _jsonl_documents(source: FileSource) -> Iterator[str]:
    """Rows are read as lines and parsed here: rows of one file may have different keys, which table readers refuse."""
    for _, path in source_files(source):
        with _readable(str(path)):
            import datasets

            lines = datasets.load_dataset("text", data_files=[str(path)], split="train", streaming=True)
            for number, row in enumerate(lines, start=1):
                if row["text"].strip():
                    yield _json_text(row["text"], source.text, f"{path}, line {number}")


def _json_text(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} found, wanted an object with the key {column!r}")
    text = _row_text(row, column, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text has no UTF-8 form: {error.reason} at character {error.start}") from None
    return text


def _parquet_documents(source: FileSource) -> Iterator[str]:
    for _, path in source_files(source):
        with _readable(str(path)):
            import datasets
            import pyarrow.parquet

            _require_column(source.text, pyarrow.parquet.read_schema(path).names, str(path))
            rows = datasets.load_dataset(
                "parquet", data_files=[str(path)], split="train", streaming=True, columns=[source.text]
            )
            for number, row in enumerate(rows, start=1):
                yield _row_text(row, source.text, f"{path}, row {number}")


def _hub_documents(source: HfSource, skip: int) -> Iterator[str]:
    rows = _hub_dataset(source)
    if rows.column_names is not None:
        _require_column(source.text, rows.column_names, source.name)
    with _reachable(source):
        for number, row in enumerate(rows.skip(skip), start=skip + 1):
            yield _row_text(row, source.text, f"{source.name}, row {number}")


def _hub_dataset(source: HfSource) -> Any:
    import datasets

    with _reachable(source):
        return datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=True
        )


def _row_text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        _require_column(column, list(row), where)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f'{where}: column "{column}" holds {type(text).__name__}, wanted text: set data.source.text')
    return text


def _require_column(column: str, known: list[str], where: str) -> None:
    if column not in known:
        raise DataError(f'{where}: data.source.text names "{column}", which is not there{did_you_mean(column, known)}')


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn what a reader raises about a damaged file into one line that names it."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {where}: {_first_line(error)}") from None


@contextmanager
def _reachable(source: HfSource) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line that says what to do."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        raise DataError(
            f'cannot read data set "{source.name}" from the Hugging Face hub: {_first_line(error)}. '
            "Check data.source (name, subset, split, revision). Where this machine has no network, run "
            "`llmtrain prepare` on one that has (a login node) and copy the folder data.path, or use a local source "
            "(jsonl, parquet, text, stdlib). What is prepared so far is kept: the same command continues it"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
