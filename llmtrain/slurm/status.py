"""How does a run get on? Its attempts, what each made and lost, and when it will be finished.

Read from the run folder alone: `attempts.jsonl`, `metrics.jsonl`, and the rows a resume set aside. An attempt's lost
updates are those after its last checkpoint, which the next one made again.
"""

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config_file import load_config
from llmtrain.errors import ConfigError
from llmtrain.train.attempts import lead_s, read_attempts
from llmtrain.train.metrics import METRICS_FILE, read_metrics, read_superseded

RECENT = 100  # updates that the remaining time is reckoned from


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    job: str | None
    restart: int
    started: float  # Unix, s
    hosts: list[str]
    ranks: int
    first: int  # the update gone on from
    last: int  # the last one made
    lost: int  # of these, made again by a later attempt
    outcome: str  # finished, stopped, failed, or open: it runs, or was killed
    reason: str


@dataclass(frozen=True)
class Status:
    """A run, as its folder tells it."""

    run: str
    update: int
    updates: int
    loss: float | None
    seconds_per_update: float | None
    remaining_s: float | None
    lead_s: int | None
    attempts: list[Attempt]
    mistakes: list[str]  # of starts that ended before the first update

    @property
    def finished(self) -> bool:
        return any(attempt.outcome == "finished" for attempt in self.attempts)


def status_of(run_dir: Path) -> Status:
    """Raises ConfigError where `run_dir` is no run folder."""
    notes = read_attempts(run_dir)
    if not notes and not (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir} is not a run folder: it has neither config.yaml nor attempts.jsonl")
    rows = read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else []
    rows = [row for row in rows if row["kind"] == "step"]
    lost = Counter(row["attempt"] for row in read_superseded(run_dir) if row["kind"] == "step")
    updates = load_config(run_dir / "config.yaml").last_update if (run_dir / "config.yaml").exists() else 0
    recent = [row["step_time_s"] for row in rows[-RECENT:]]
    pace = statistics.median(recent) if recent else None
    update = rows[-1]["step"] if rows else 0
    attempts = _attempts(notes, rows, lost)
    done = bool(attempts) and attempts[-1].outcome == "finished"
    return Status(
        run=run_dir.name,
        update=update,
        updates=updates,
        loss=rows[-1]["loss"] if rows else None,
        seconds_per_update=pace,
        remaining_s=0.0 if done else None if pace is None else pace * max(0, updates - update),
        lead_s=lead_s(run_dir),
        attempts=attempts,
        mistakes=[note["reason"] for note in notes if note.get("outcome") == "failed" and "attempt" not in note],
    )


def _attempts(notes: list[dict[str, Any]], rows: list[dict[str, Any]], lost: Counter[int]) -> list[Attempt]:
    last = {row["attempt"]: row["step"] for row in rows}
    found = []
    for index, note in enumerate(notes):
        if note["event"] != "started":
            continue
        later = [other for other in notes[index + 1 :] if _same_start(other, note)]
        end = next((other for other in later if other["event"] == "ended"), {})
        number = note["attempt"]
        found.append(
            Attempt(
                number=number,
                job=note["job"],
                restart=note["restart"],
                started=note["time"],
                hosts=note["hosts"],
                ranks=note["ranks"],
                first=note["update"],
                last=max(last.get(number, note["update"]), note["update"]) + lost[number],
                lost=lost[number],
                outcome=end.get("outcome", "open"),
                reason=end.get("reason", ""),
            )
        )
    return found


def _same_start(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["job"], one["restart"]) == (other["job"], other["restart"])
