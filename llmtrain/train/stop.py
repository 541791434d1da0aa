"""When must a run end before its last update?

On SIGTERM, SIGINT, SIGUSR1 or SIGUSR2, when a file `stop` appears in the run folder, or when the wall-clock budget is
used up. Here that only raises a flag; the ranks agree on it between updates, save at the same update, and end.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llmtrain.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Collects reasons to stop on this rank, and asks the others for theirs."""

    def __init__(self, run_dir: Path, max_minutes: float | None, started: float | None = None) -> None:
        """`started`: when the job began, by time.monotonic(); now where it is not given."""
        self.file = run_dir / "stop"
        started = time.monotonic() if started is None else started
        self.deadline = None if max_minutes is None else started + 60 * max_minutes
        self.reason = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block. A second one changes nothing: the save must not be cut short."""
        before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None stands for a handler that Python cannot put back: one set by a library in C.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self, world: World) -> str:
        """The reason to stop after this update, the same on every rank; empty to go on."""
        if not self.reason and world.first:
            if self.file.exists():
                self.reason = f"the file {self.file} exists"
            elif self.deadline is not None and time.monotonic() > self.deadline:
                self.reason = "run.max_minutes is used up"
        if not world.any(bool(self.reason)):
            return ""
        return next(reason for reason in world.gather_text(self.reason) if reason)

    def clear(self) -> None:
        """Remove the stop file, so that the next start goes on."""
        self.file.unlink(missing_ok=True)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"signal {signal.Signals(number).name}"
