"""How far is a preparation? A bar on a terminal, a plain line every ten seconds in a log; both on stderr."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llmtrain.data.sources import SourceSize

_PLAIN_EVERY_S = 10.0


class PrepareProgress:
    """Counts text and documents towards the source's size, as far as that is known."""

    def __init__(self, size: SourceSize) -> None:
        self._size = size
        self._console = Console(stderr=True, highlight=False)
        self._bytes = self._documents = 0
        self._kept_bytes = self._kept_documents = 0  # by an earlier call: they say nothing about the speed
        self._began = self._printed = time.monotonic()
        columns = TextColumn("tokenizing"), BarColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("reading ...", total=1.0 if self._share() is not None else None)

    def __enter__(self) -> "PrepareProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        if kind is None:
            self._console.print(f"tokenized {self.line(eta=False)}", soft_wrap=True)

    def advance(self, size: int, documents: int, *, kept: bool = False) -> None:
        """Another unit is done, or was found done (`kept`)."""
        self._bytes += size
        self._documents += documents
        if kept:
            self._kept_bytes += size
            self._kept_documents += documents
        share = self._share()
        if self._console.is_terminal:
            self._bar.update(self._task, completed=share or 0.0, description=self.line())
        elif time.monotonic() - self._printed >= _PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self._console.print(f"tokenizing {self.line()}", soft_wrap=True)

    def line(self, eta: bool = True) -> str:
        """`12.3 MB, 456 documents, 3.1 MB/s, ETA 0:01:23`."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        parts = [f"{self._bytes / 1e6:,.1f} MB", f"{self._documents:,} documents"]
        if self._bytes > self._kept_bytes:
            parts.append(f"{(self._bytes - self._kept_bytes) / 1e6 / elapsed:.1f} MB/s")
        share, kept_share = self._share(), self._share(kept=True)
        if eta and share is not None and kept_share is not None and kept_share < share < 1:
            left_s = elapsed * (1 - share) / (share - kept_share)
            parts.append(f"ETA {timedelta(seconds=round(left_s))}")
        return ", ".join(parts)

    def _share(self, kept: bool = False) -> float | None:
        """How much of the source is done, by bytes or else by documents; None where neither total is known."""
        if self._size.bytes:
            return min(1.0, (self._kept_bytes if kept else self._bytes) / self._size.bytes)
        if self._size.documents:
            return min(1.0, (self._kept_documents if kept else self._documents) / self._size.documents)
        return None


def note(text: str) -> None:
    """One plain line on stderr."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)
