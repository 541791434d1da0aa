"""How far is a sweep? A table that renews itself on a terminal, a line for each event in a log."""

import math
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table as Drawn

from llmtrain.study.report import Table
from llmtrain.study.report_printed import printed
from llmtrain.study.sweep import Job
from llmtrain.study.sweep_file import Planned

_RENEWED_S = 1.0
_MORE_LINES = 12  # of the terminal that the table leaves to others


class SweepShown:
    """Shows a sweep while it runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.started = time.monotonic()
        self.renewed = -math.inf
        self.jobs: Sequence[Job] = ()  # as they were looked at last
        self.first: dict[int, tuple[float, int]] = {}  # of each run: when it was started here, after which update

    def __enter__(self) -> "SweepShown":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.live is not None:
            self.live.update(self._table(self.jobs), refresh=True)
            self.live.stop()

    def begun(self, job: Job) -> None:
        """A run was started."""
        self.first[job.run.index] = (time.monotonic(), job.update)
        where = f"from update {job.update:,} on" if job.update else "from the start"
        self._say(f"run {job.run.index} {job.run.name}: training {where} of {job.run.updates:,} updates")

    def ended(self, job: Job) -> None:
        """A run has ended."""
        seconds = time.monotonic() - self.first[job.run.index][0]
        said = {
            "finished": f"finished, validation loss {_loss(job)}",
            "stopped": f"stopped after update {job.update:,} of {job.run.updates:,}",
        }.get(job.stage, f"FAILED after update {job.update:,} of {job.run.updates:,}, exit code {job.exit_code}")
        self._say(f"run {job.run.index} {job.run.name}: {said}, {_clock(seconds)}")

    def look(self, jobs: Sequence[Job]) -> None:
        """Renew the table."""
        self.jobs, now = jobs, time.monotonic()
        if self.live is not None and now - self.renewed >= _RENEWED_S:
            self.renewed = now
            self.live.update(self._table(jobs), refresh=True)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self, jobs: Sequence[Job]) -> Drawn:
        room = max(3, self.console.height - _MORE_LINES)
        rows = [job for job in jobs if len(jobs) <= room or job.stage in ("training", "failed")][:room]
        counts = {job.stage: sum(other.stage == job.stage for other in jobs) for job in jobs}
        title = ", ".join(f"{count} {stage}" for stage, count in counts.items())
        left = self._seconds_left(jobs)
        title += "" if left is None else f", about {_clock(left)} to go"
        head = ["run", "name", "state", "update", "of", "loss", "val loss", "to go"]
        body = [
            [
                *(str(job.run.index), job.run.name, job.stage, f"{job.update:,}", f"{job.run.updates:,}"),
                "" if job.rows.step is None else f"{job.rows.step['loss']:.4f}",
                _loss(job),
                "" if (own := self._own_seconds_left(job)) is None else _clock(own),
            ]
            for job in rows
        ]
        return printed(Table("", head, body, 3), title)

    def _pace(self, job: Job) -> float | None:
        """Seconds an update, its share of validations and saves included."""
        since, update = self.first.get(job.run.index, (0.0, 0))
        return (time.monotonic() - since) / (job.update - update) if job.update > update else None

    def _own_seconds_left(self, job: Job) -> float | None:
        pace = self._pace(job) if job.stage == "training" else None
        return None if pace is None else pace * (job.run.updates - job.update)

    def _seconds_left(self, jobs: Sequence[Job]) -> float | None:
        """Until all are trained, as many at once as now, at the pace of those that train now."""
        training = [job for job in jobs if job.stage == "training"]
        paces = [pace for job in training if (pace := self._pace(job)) is not None]
        if not paces:
            return None
        updates = sum(job.run.updates - job.update for job in jobs if job.stage in ("training", "waiting"))
        return float(np.mean(paces)) * updates / len(training)


def plan_table(planned: Planned, states: Sequence[str]) -> Table:
    """One row a run: what a sweep would train."""
    head = ["run", "name", "state", "schedule", "warm-up", "peak", "seed", "updates", "tokens", "area"]
    rows = [
        [
            *(str(run.index), run.name, state, run.schedule.name, str(run.config.schedule.warmup)),
            *(f"{run.schedule.peak:g}", str(run.config.run.seed), f"{run.updates:,}", f"{run.tokens:,}"),
            f"{run.area:.4g}",
        ]
        for run, state in zip(planned.runs, states, strict=True)
    ]
    return Table("Runs", head, rows, 5)


def _loss(job: Job) -> str:
    return "" if job.rows.validation is None else f"{job.rows.validation['loss']:.4f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
