"""What happened at each update? `metrics.jsonl`, append-only, is the truth; everything else mirrors it.

One JSON object a line. `kind` is `step` (loss, lr, grad_norm of update k) or `validation` (loss, perplexity and
nats_per_byte of a named set after update k). A resume moves the rows beyond its step to `metrics.superseded.jsonl`, so
no update stands twice. No torch here: reports read this file on a login node.
"""

import errno
import json
import math
import os
import threading
import warnings
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"
DOCUMENTS_FILE = "validation_documents.npy"  # of the last validation: (D, 2) float64, summed nats and tokens


class MetricsLog:
    """Writes one run's rows. Only the first rank has one."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_FILE
        self.superseded = run_dir / SUPERSEDED_FILE
        self._waiting: list[str] = []  # rows that a full disk has not taken yet
        self._writing = threading.Lock()  # a save in the background writes them too
        run_dir.mkdir(parents=True, exist_ok=True)

    def next_attempt(self) -> int:
        """The number of the leg that starts now: one more than any leg that left a row, superseded or not."""
        rows = [row for path in (self.path, self.superseded) if path.exists() for row in _rows(path)]
        return 1 + max((row.get("attempt", 1) for row in rows), default=0)

    def validated(self, step: int) -> bool:
        """Whether there is a validation after update `step`."""
        rows = _rows(self.path) if self.path.exists() else []
        return any(row["kind"] == "validation" and row["step"] == step for row in rows)

    def lost(self, offset: int) -> bool:
        """Whether rows are gone that were on the disk when a checkpoint was saved, `offset` bytes of them."""
        return offset > (self.path.stat().st_size if self.path.exists() else 0)

    def rewind(self, step: int) -> int:
        """Keep the rows up to `step` (-1: none) and set the others aside. Returns how many were set aside."""
        if not self.path.exists():
            return 0
        rows = _rows(self.path)
        moved = [row for row in rows if row["step"] > step]
        if moved:
            with self.superseded.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in moved)
                file.flush()
                os.fsync(file.fileno())
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        return len(moved)

    def append(self, row: dict[str, Any]) -> None:
        """Add one row, in the file system's hands when this returns, or kept until the disk takes it."""
        with self._writing:
            waited = bool(self._waiting)
            self._waiting.append(json.dumps(row) + "\n")
        problem = self._write()
        if problem and not waited:
            warnings.warn(f"{problem}; its rows wait in memory, training goes on", stacklevel=2)

    def sync(self) -> str:
        """Called before a checkpoint that these rows lead to is published. Returns what keeps them from the disk."""
        problem = self._write()
        if not problem and self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())
        return problem

    def offset(self) -> int:
        """Bytes of the rows so far, those that wait for the disk too."""
        with self._writing:
            there = self.path.stat().st_size if self.path.exists() else 0
            return there + sum(len(line.encode()) for line in self._waiting)

    def _write(self) -> str:
        """Write the rows that wait, all or none. Returns what went wrong."""
        with self._writing:
            return self._write_waiting("".join(self._waiting).encode())

    def _write_waiting(self, data: bytes) -> str:
        if not data:
            return ""
        try:
            with self.path.open("ab", buffering=0) as file:
                before = os.fstat(file.fileno()).st_size
                try:
                    if file.write(data) != len(data):  # a disk that fills up takes the beginning
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            return f"{self.path} could not be written: {error.strerror}"
        self._waiting.clear()
        return ""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole rows of a run, in order. Raises DataError where the run has none."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
    return _rows(path)


def read_superseded(run_dir: Path) -> list[dict[str, Any]]:
    """The rows that resumes set aside, because their updates were made again; none where there are none."""
    path = run_dir / SUPERSEDED_FILE
    return _rows(path) if path.is_file() else []


def perplexity(nats: float) -> float:
    """exp(nats), infinity where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without the torn last line of a killed process."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
