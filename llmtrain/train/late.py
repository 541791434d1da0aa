"""When is an update's loss read? Where reading costs no waiting.

A GPU runs behind the program that feeds it, and reading a number from it waits until it has caught up. So there the
numbers of update k are copied to the host behind its last kernel and recorded once update k + 1 is under way; before a
validation, a save and the end nothing stays unrecorded. Elsewhere an update is recorded when it is made. Rows come in
order and hold the same numbers either way. Times are the device's own: from the end of what ran before an update, or
from its start where that was later, to its end.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.engines.base import StepStats

Record = Callable[[int, StepStats, float], None]


class _Made(NamedTuple):
    k: int
    stats: StepStats
    began: torch.cuda.Event
    ended: torch.cuda.Event


class Late:
    """Passes updates on to `record(k, stats, seconds)`, in order."""

    def __init__(self, device: torch.device, record: Record) -> None:
        self._record = record
        self._behind = device.type == "cuda"
        self._waiting: _Made | None = None
        self.start()

    def start(self) -> None:
        """The next update begins now, with its batch."""
        if self._behind:
            self._event = _event()
        else:
            self._clock = time.perf_counter()

    def made(self, k: int, stats: StepStats) -> None:
        """Update k is made, or on its way: record it, or on a GPU the one before it."""
        if not self._behind:
            self._record(k, stats, time.perf_counter() - self._clock)
            return
        landing = stats._replace(loss=_landing(stats.loss), grad_norm=_landing(stats.grad_norm))
        newest = _Made(k, landing, self._event, _event())
        self.flush()
        self._waiting = newest

    def flush(self) -> None:
        """Record what waits."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.ended.synchronize()
            self._record(waiting.k, waiting.stats, waiting.began.elapsed_time(waiting.ended) / 1000)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _landing(value: Tensor) -> Tensor:
    """A copy on the host, complete once an event recorded after it has passed."""
    return value.detach().to("cpu", non_blocking=True)
