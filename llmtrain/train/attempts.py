"""What became of each start of a run? `attempts.jsonl`, append-only, has a row for each start and each end.

`started`: attempt, time (Unix, s), Slurm's job and restart, hosts, ranks, the update gone on from, and what the first
rank looked at to know where things lie: token files, files of the checkpoint and their bytes. `ended`: outcome
(finished, stopped or failed), reason, update, slowest_s (longest time from one update to the next, validation and all)
and save_s (of the last checkpoint). A start without an end was killed, or still runs. No torch here.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.errors import LlmtrainError, RankError

ATTEMPTS_FILE = "attempts.jsonl"
SPARE_S = 30  # on top of what saving took: the load of the disk differs


def job_of(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Slurm's job and how often it was requeued; None outside of one."""
    job = environment.get("SLURM_JOB_ID")
    return (job, int(environment.get("SLURM_RESTART_COUNT") or 0)) if job else None


def first_of_node(environment: Mapping[str, str]) -> bool:
    """Whether this process is its node's first rank; all ranks of a node make the same mistake."""
    return int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or 0) == 0


def note(run_dir: Path, event: str, **facts: Any) -> None:
    """Add a row. A disk that does not take it is no reason to stop training."""
    job, restart = job_of(os.environ) or (None, 0)
    row = {"event": event, "time": round(time.time(), 3), "job": job, "restart": restart, **facts}
    with contextlib.suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / ATTEMPTS_FILE).open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")


@contextmanager
def recorded(run_dir: Path) -> Iterator[None]:
    """Note a mistake inside the block, in a Slurm job: who decides whether it is started again must know of it.

    srun's exit code does not tell: where one rank fails and the others are ended, it is theirs. Of the nodes that make
    the same one, the first to note it tells it.
    """
    try:
        yield
    except LlmtrainError as error:
        if job_of(os.environ) is None or not first_of_node(os.environ) or isinstance(error, RankError):
            raise
        same = {"outcome": "failed", "reason": str(error), "step": os.environ.get("SLURM_STEP_ID")}
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
        note(run_dir, "ended", **same, exit_code=error.exit_code, rank=rank)
        alike = [row for row in read_attempts(run_dir) if _alike(row, same)]
        if not alike or alike[0]["rank"] == rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def _alike(row: dict[str, Any], same: Mapping[str, Any]) -> bool:
    """Whether a row notes this failure of this start of this job."""
    return (row["job"], row["restart"]) == job_of(os.environ) and same.items() <= row.items()


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All whole rows, in order; none where the run has none."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / ATTEMPTS_FILE).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "event" in row]


def lead_s(run_dir: Path) -> int | None:
    """How long before its end a job must be told to save, from what was measured so far; None where nothing was."""
    measured = [row["slowest_s"] + row["save_s"] for row in read_attempts(run_dir) if row.get("save_s") is not None]
    return math.ceil(2 * max(measured[-5:]) + SPARE_S) if measured else None


def seconds_left(run_dir: Path, environment: Mapping[str, str]) -> float | None:
    """Seconds until this job must begin to save, by its time limit and what was measured; None where not known."""
    lead, end = lead_s(run_dir), environment.get("SLURM_JOB_END_TIME", "")
    if lead is None or not end.isdigit() or float(end) < time.time():  # an end in the past is no end
        return None
    return float(end) - time.time() - lead
