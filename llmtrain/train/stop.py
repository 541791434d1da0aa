"""When must a run end before its last update?

On SIGTERM, SIGINT, SIGUSR1 or SIGUSR2, when a file `stop` appears in the run folder, when the wall-clock budget is used
up, or when the time limit of the job is near. Here that only raises a flag; the ranks agree on it between updates, save
at the same update, and end. They do not ask each other after every update: after so many as take POLL_S, which the
first rank measures and tells the others where they agree. No torch here: the door listens before it loads torch, which
takes long.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain.distributed import World

USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # what a scheduler announces the end with
SIGNALS = (signal.SIGTERM, signal.SIGINT, *USER_SIGNALS)
POLL_S = 2.0  # between two agreements, where an update is shorter: of a preempted job's 30 s the save needs the most


class StopRequest:
    """Collects reasons to stop on this rank, and asks the others for theirs."""

    def __init__(
        self, run_dir: Path, max_minutes: float | None, started: float | None = None, job_left_s: float | None = None
    ) -> None:
        """`started`: when the job began, by time.monotonic(); now where it is not given. `job_left_s`: seconds from now
        until the job must begin to save for the sake of its time limit."""
        self.file = run_dir / "stop"
        now = time.monotonic()
        started = now if started is None else started
        self.deadline = None if max_minutes is None else started + 60 * max_minutes
        self.job_deadline = None if job_left_s is None else now + job_left_s
        self.reason = ""
        self.asked_at: float | None = None  # the last update's end
        self.slowest_s = 0.0  # from one update's end to the next
        self._every = 1  # updates between agreements, the same on every rank
        self._since = 0  # updates made since the last one
        self._polled_at: float | None = None

    @contextmanager
    def listening(self, numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
        """Handle the signals inside the block. A second one changes nothing: the save must not be cut short."""
        before = {number: signal.signal(number, self._heard) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) == self._heard:  # else somebody set another one since, which stays
                    # None stands for a handler that Python cannot put back: one set by a library in C.
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self, world: "World", due: bool = False) -> str:
        """The reason to stop after this update, the same on every rank; empty to go on.

        To be called after every update. The ranks ask each other where it is `due`, which must be the same on every
        rank, and where enough updates were made since they did; else no message is sent.
        """
        now = time.monotonic()
        if self.asked_at is not None:
            self.slowest_s = max(self.slowest_s, now - self.asked_at)
        self.asked_at = now
        self._since += 1
        if world.size > 1 and not due and self._since < self._every:
            return ""
        if not self.reason and world.first:
            if self.file.exists():
                self.reason = f"the file {self.file} exists"
            elif self.deadline is not None and now > self.deadline:
                self.reason = "run.max_minutes is used up"
            elif self.job_deadline is not None and now > self.job_deadline:
                self.reason = "the job's time limit is near"
        mine = self._next_poll(now) if world.first else 0
        stops, self._every = world.largest(bool(self.reason), mine)
        self._since = 0
        if not stops:
            return ""
        return next(reason for reason in world.gather_text(self.reason) if reason)

    def _next_poll(self, now: float) -> int:
        """After how many updates to agree again, from how long those since the last time took."""
        every = 1
        if self._polled_at is not None and now > self._polled_at:
            every = max(1, int(POLL_S * self._since / (now - self._polled_at)))
        self._polled_at = now
        return every

    def clear(self) -> None:
        """Remove the stop file, so that the next start goes on."""
        self.file.unlink(missing_ok=True)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"signal {signal.Signals(number).name}"
