"""What happened at each update? `metrics.jsonl`, append-only, is the truth; everything else mirrors it.

One JSON object a line. `kind` is `step` (loss, lr, grad_norm of update k) or `validation` (loss, perplexity and
nats_per_byte of a named set after update k). A resume moves the rows beyond its step to `metrics.superseded.jsonl`, so
no update stands twice. No torch here: reports read this file on a login node.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes one run's rows. Only the first rank has one."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_FILE
        run_dir.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> int:
        """Keep the rows up to `step` (-1: none) and set the others aside. Returns how many were set aside."""
        if not self.path.exists():
            return 0
        kept: list[str] = []
        moved: list[str] = []
        for line in self.path.read_text().splitlines():
            row = _parsed(line)
            if row is not None:
                (kept if row["step"] <= step else moved).append(line)
        if moved:
            with self.path.with_name("metrics.superseded.jsonl").open("a") as file:
                file.writelines(line + "\n" for line in moved)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(line + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        return len(moved)

    def append(self, row: dict[str, Any]) -> None:
        """Add one row, in the file system's hands when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """On the disk when this returns; called before a checkpoint that these rows lead to is published."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole rows of a run, in order. Raises DataError where the run has none."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
    rows = [_parsed(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row is not None]


def perplexity(nats: float) -> float:
    """exp(nats), infinity where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def _parsed(line: str) -> dict[str, Any] | None:
    """A row, or None for the torn last line of a killed process."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
