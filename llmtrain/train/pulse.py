"""Does another rank live, and has one begun to report a failure? Asked of the store where the ranks met.

Each rank counts up a number of its own there, and reads that of the next rank: three requests a beat, however many
ranks there are. A thread does it that does nothing else, over a connection of its own, so neither a collective of the
main thread nor a slow file system keeps it. The store lives in the process of the first rank, or in torchrun's agent on
its node: where that is frozen a request never returns, so nobody else waits for this thread without a limit.
"""

import contextlib
import threading

from torch.distributed import Store  # type: ignore[attr-defined]

BEATS_PER_S = 1000  # of all ranks together


class Pulse:
    """This rank's beat and what it hears, for the length of a `with` block."""

    def __init__(self, store: Store, job: str, rank: int, size: int, every_s: float) -> None:
        """`store` is used by this thread alone; `job` tells this attempt from those before it."""
        self.every_s = max(every_s, size / BEATS_PER_S)
        self.count = -1  # of the next rank
        self.called = False  # some rank has begun to report a failure
        self.answers = 0  # beats that the store took
        self._store, self._job, self._rank, self._size = store, job, rank, size
        self._calls = False
        self._everyone: list[int] | None = None
        self._asked, self._answered, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="pulse", daemon=True)

    def __enter__(self) -> "Pulse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._asked.set()
        self._thread.join(2 * self.every_s)

    def call(self) -> None:
        """Tell all ranks that this one has begun to report a failure."""
        self._calls = True
        self._asked.set()

    def everyone(self, within_s: float) -> list[int] | None:
        """The numbers of all ranks; None where the store does not tell them in so many seconds."""
        self._answered.clear()
        self._everyone = None
        self._asked.set()
        return self._everyone if self._answered.wait(within_s) else None

    def _work(self) -> None:
        with contextlib.suppress(RuntimeError):  # a connection that broke does not come back
            while not self._over.is_set():
                asked = self._asked.is_set()
                self._asked.clear()
                self._add(str(self._rank), 1)
                self.count = self._add(str((self._rank + 1) % self._size), 0)
                self.called = self._add("calls", int(self._calls)) > 0
                self.answers += 1
                if asked:
                    self._everyone = [self._add(str(rank), 0) for rank in range(self._size)]
                    self._answered.set()
                self._asked.wait(self.every_s)

    def _add(self, name: str, number: int) -> int:
        """What stands under a name once so much is added: 0 where nobody has written it, where others requests wait."""
        return int(self._store.add(f"pulse/{self._job}/{name}", number))
