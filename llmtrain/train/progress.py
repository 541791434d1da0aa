"""What does a person see while a run trains? A live line on a terminal, plain lines in a log, from the first rank."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows updates and validations of one leg of a run."""

    def __init__(self, *, shown: bool, first_update: int, last_update: int, every: int) -> None:
        self.console = Console(quiet=not shown, highlight=False, soft_wrap=True)
        self.live = shown and self.console.is_terminal
        self.first, self.last, self.every = first_update, last_update, every
        self.seconds = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=last_update, completed=first_update)

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.bar.console.print(text, markup=False)

    def step(self, row: dict[str, Any]) -> None:
        """Show one update's metrics row."""
        k = row["step"]
        self.seconds += row["step_time_s"]
        facts = f"loss {row['loss']:.4f}  lr {row['lr']:.3e}  grad_norm {row['grad_norm']:.3f}"
        facts += f"  {row['tokens_per_s']:,.0f} tok/s"
        if row["mfu"] is not None:
            facts += f"  mfu {row['mfu']:.1%}"
        if self.live:
            self.bar.update(self.task, completed=k, description=facts)
        elif k % self.every == 0 or k in (self.first + 1, self.last):
            left = self.seconds / (k - self.first) * (self.last - k)
            self.say(f"step {k}/{self.last}  {facts}  {row['memory_gib']:.2f} GiB  eta {_clock(left)}")

    def validation(self, row: dict[str, Any]) -> None:
        """Show one validation's metrics row."""
        averaged = f"  (EMA: loss {row['ema_loss']:.4f})" if "ema_loss" in row else ""
        self.say(
            f"step {row['step']}/{self.last}  {row['set']}: loss {row['loss']:.4f}  "
            f"perplexity {row['perplexity']:.2f}  nats/byte {row['nats_per_byte']:.4f}{averaged}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
