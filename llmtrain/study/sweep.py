"""How are the runs of a study trained, some at a time, whatever happens to any of them?

Each run is a process of its own. One that fails is told of at the end and holds up no other. On SIGINT or SIGTERM the
trainings are told to stop, which saves them, and the same command goes on. Nothing about progress is kept but what the
run folders hold.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from llmtrain.errors import EnvironmentError
from llmtrain.study.compare import Comparison
from llmtrain.study.report import markdown
from llmtrain.study.report_data import as_json, write_csv
from llmtrain.study.report_page import write_html
from llmtrain.study.sweep_file import Run
from llmtrain.study.sweep_state import Rows, last_rows, state_of, write_config

LOG_FILE = "train.log"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_POLL_S = 0.2
_LOG_BYTES = 8192  # read of the end of a failed run's log
_LOG_LINES = 12  # shown of it

Stage = Literal["waiting", "training", "finished", "stopped", "failed"]


class Training(Protocol):
    """A process that trains, as `subprocess.Popen` is one."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...


StartTraining = Callable[[Path, Path, int], Training]  # config, log, which of those that train at once: from 0


class Shown(Protocol):
    """Where it is told how far the runs are."""

    def begun(self, job: "Job") -> None: ...
    def ended(self, job: "Job") -> None: ...
    def look(self, jobs: "Sequence[Job]") -> None: ...


@dataclass
class Job:
    """One run on its way."""

    run: Run
    stage: Stage
    rows: Rows
    exit_code: int | None = None
    process: Training | None = None
    slot: int = 0
    log_start: int = 0  # bytes that were in the log before

    @property
    def update(self) -> int:
        """Updates made."""
        return 0 if self.rows.step is None else int(self.rows.step["step"])

    def log_end(self) -> list[str]:
        """The last lines that a failed training wrote."""
        path = self.run.folder / LOG_FILE
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(self.log_start, size - _LOG_BYTES))
                text = file.read().decode(errors="replace")
        except OSError as error:
            return [f"{path}: {error.strerror}"]
        return [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]


@dataclass
class Stop:
    """Whether a signal asked for an end."""

    signal: str = field(default="")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block. A second one changes nothing."""
        before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name


def sweep(runs: Sequence[Run], at_once: int, start: StartTraining, shown: Shown) -> tuple[list[Job], str]:
    """Train what is not finished, `at_once` runs at a time. Returns how each run stands, and the signal that ended it.

    A training that exits with 0 before its last update was told to stop: that is no failure.
    """
    jobs = [Job(run, "finished" if state_of(run) == "finished" else "waiting", last_rows(run.folder)) for run in runs]
    stop = Stop()
    try:
        with stop.listening():
            _train(jobs, at_once, start, shown, stop)
    finally:
        _terminate(jobs)  # those that an error left behind
    return jobs, stop.signal


def write_reports(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the comparison of a study into its folder. Nothing in it depends on when or how often its runs ran."""
    text, page, numbers, rows = (folder / f"report.{kind}" for kind in ("md", "html", "json", "csv"))
    try:
        text.write_text(markdown(comparison), encoding="utf-8")
        write_html(comparison, page)
        numbers.write_text(json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n")
        write_csv(comparison, rows)
    except OSError as error:
        raise EnvironmentError(f"cannot write {error.filename}: {error.strerror}") from None
    return [text, page, numbers, rows]


def _train(jobs: Sequence[Job], at_once: int, start: StartTraining, shown: Shown, stop: Stop) -> None:
    told = False
    while True:
        training = [job for job in jobs if job.stage == "training"]
        waiting = [] if stop.signal else [job for job in jobs if job.stage == "waiting"]
        if not training and not waiting:
            return
        if stop.signal and not told:
            _terminate(training)
            told = True
        free = sorted(set(range(at_once)) - {job.slot for job in training})
        for job, slot in zip(waiting, free, strict=False):
            _start(job, slot, start)
            shown.begun(job)
        for job in training:
            if _ended(job, stopping=bool(stop.signal)):
                shown.ended(job)
        shown.look(jobs)
        time.sleep(_POLL_S)


def _start(job: Job, slot: int, start: StartTraining) -> None:
    log = job.run.folder / LOG_FILE
    try:
        config = write_config(job.run)
        job.log_start = log.stat().st_size if log.exists() else 0
        job.process = start(config, log, slot)
    except OSError as error:
        raise EnvironmentError(f"{job.run.name} cannot be started: {error}") from None
    job.slot, job.stage = slot, "training"


def _terminate(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.stage == "training" and job.process is not None:
            job.process.terminate()


def _ended(job: Job, *, stopping: bool) -> bool:
    """Whether the training has ended; then its job knows how."""
    assert job.process is not None
    job.exit_code = job.process.poll()
    job.rows = last_rows(job.run.folder)
    if job.exit_code is None:
        return False
    if state_of(job.run) == "finished":
        job.stage = "finished"
    else:
        job.stage = "stopped" if stopping or job.exit_code == 0 else "failed"
    return True
