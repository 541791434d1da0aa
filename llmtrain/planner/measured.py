"""Which model FLOPs utilisation was measured, by a run or by a benchmark?"""

import json
from pathlib import Path
from statistics import median
from typing import Any

from llmtrain.errors import ConfigError

METRICS = "metrics.jsonl"
ROWS = 200


def read_mfu(path: Path) -> float:
    """The median MFU of a run folder's newest updates, or the `mfu` of a result file. Raises ConfigError."""
    file = path / METRICS if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if path.is_dir() else [json.loads(text)]
    except OSError as error:
        raise ConfigError(f"--measured: cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--measured: {file} is not JSON: {error}") from None
    found = [row["mfu"] for row in rows if _has_mfu(row)][-ROWS:]
    if not found:
        raise ConfigError(f"--measured: {file} has no mfu (on a CPU and on unknown GPUs there is none): give --mfu")
    return float(median(found))


def _has_mfu(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("mfu"), int | float)
