"""What do the run folders under one directory hold?

Read-only. A folder is opened beside its parent and a file beside its folder, and neither may be a link, so that no name
leads out of the directory, not even one that is exchanged in between.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml

from llmtrain.config_file import parse_yaml
from llmtrain.errors import ConfigError
from llmtrain.serve import limits
from llmtrain.serve.refusals import refuse
from llmtrain.train.metrics import METRICS_FILE

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
CONFIG_FILE = "config.yaml"
_TAIL_BYTES = 64 * 1024
_NO_LINK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Every run folder by name: its newest row, and how much there is to read."""
    names = sorted(path.name for path in root.iterdir() if re.match(NAME_PATTERN, path.name))
    found = []
    for name in names:
        with _opened(root, name, METRICS_FILE) as file:
            if file is not None:
                found.append(_overview(name, file))
        if len(found) == limits.RUNS:
            break
    return found


def show_run(root: Path, name: str) -> dict[str, Any]:
    """One run: its config as written, and its newest row."""
    with _opened(root, name, METRICS_FILE) as file:
        if file is None:
            raise _no_run(name)
        overview = _overview(name, file)
    with _opened(root, name, CONFIG_FILE) as file:
        text = "" if file is None else file.read(limits.CONFIG_BYTES).decode(errors="replace")
    return {**overview, "config": _config(text)}


def read_rows(
    root: Path, name: str, after: int, file_id: str | None, limit: int, kind: Literal["step", "validation"] | None
) -> dict[str, Any]:
    """Whole rows of metrics.jsonl from byte `after` on. `next` is where to go on reading, also while the run goes on.

    A resume writes the file anew; then `file` changes, and a reader that says which file it knew starts over
    (`restarted`).
    """
    with _opened(root, name, METRICS_FILE) as file:
        if file is None:
            raise _no_run(name)
        status = os.fstat(file.fileno())
        present = f"{status.st_dev:x}-{status.st_ino:x}"
        restarted = (file_id is not None and file_id != present) or after > status.st_size
        start = 0 if restarted else after
        file.seek(start)
        lines, reached = _whole_lines(file.read(limits.ROWS_BYTES), limit)
        size = os.fstat(file.fileno()).st_size
    rows = [row for row in map(_row, lines) if row is not None and kind in (None, row.get("kind"))]
    following = start + reached
    return {"rows": rows, "next": following, "file": present, "size": size, "restarted": restarted}


def _config(text: str) -> dict[str, Any] | None:
    """A config as written; None where it cannot be read, or has aliases, which unfold without end in JSON."""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            return None
        config = parse_yaml(text, CONFIG_FILE)
    except (yaml.YAMLError, ConfigError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _whole_lines(data: bytes, limit: int) -> tuple[list[bytes], int]:
    """At most `limit` finished lines, and how many bytes they take. A line longer than all of `data` is passed over."""
    lines = data.split(b"\n", limit)
    whole = lines[:-1]
    if not whole and len(data) >= limits.ROWS_BYTES:
        return [], len(data)
    return whole, sum(len(line) + 1 for line in whole)


def _overview(name: str, file: BinaryIO) -> dict[str, Any]:
    status = os.fstat(file.fileno())
    file.seek(max(0, status.st_size - _TAIL_BYTES))
    rows = [row for row in map(_row, file.read(_TAIL_BYTES).split(b"\n")) if row is not None]
    return {
        "name": name,
        "bytes": status.st_size,
        "modified": status.st_mtime,
        "last_step": next((row for row in reversed(rows) if row.get("kind") == "step"), None),
        "last_validation": next((row for row in reversed(rows) if row.get("kind") == "validation"), None),
    }


def _row(line: bytes) -> dict[str, Any] | None:
    """One row, null where it has NaN or an infinity; None for a torn or foreign line."""
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


@contextmanager
def _opened(root: Path, name: str, file_name: str) -> Iterator[BinaryIO | None]:
    """A regular file of a run, or None where there is none. Follows no link below `root`."""
    if not re.match(NAME_PATTERN, name):
        raise _no_run(name)
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    opened = [top]
    file = None
    try:
        folder = os.open(name, _NO_LINK | os.O_DIRECTORY, dir_fd=top)
        opened.append(folder)
        handle = os.open(file_name, _NO_LINK, dir_fd=folder)
        opened.append(handle)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            file = os.fdopen(os.dup(handle), "rb")
    except OSError:
        file = None
    finally:
        for descriptor in opened:
            os.close(descriptor)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _no_run(name: str) -> Exception:
    return refuse(404, f"there is no run {name!r:.210}; GET /runs lists them", "name")
