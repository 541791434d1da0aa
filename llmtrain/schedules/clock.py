"""Where on the curve does update k stand?

A curve whose horizon is written in steps counts updates. One whose horizon is written in tokens counts the tokens
consumed through update k, so it keeps its shape over tokens when the global batch changes: the clock then gets a new
segment, and everything before it stays as it was. Positions are whole numbers, exact up to 2**53.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from llmtrain.errors import ScheduleError
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.units import Length

ClockUnit = Literal["steps", "tokens"]


@dataclass(frozen=True)
class Clock:
    """Positions in `unit`. Segments are (last update before it, tokens consumed by then, tokens per update)."""

    unit: ClockUnit
    segments: tuple[tuple[int, int, int], ...] = ()  # empty when counting steps: the batch does not matter then

    @classmethod
    def start(cls, unit: ClockUnit, tokens_per_update: int) -> "Clock":
        """A run whose global batch has not changed yet."""
        if tokens_per_update < 1:
            raise ScheduleError(f"tokens per update is {tokens_per_update}, wanted at least 1")
        return cls(unit, ((0, 0, tokens_per_update),) if unit == "tokens" else ())

    @classmethod
    def from_spec(cls, unit: Any, segments: Any) -> "Clock":
        """Read what `spec` wrote. Raises ScheduleError where it is not a clock."""
        rows = tuple(tuple(row) for row in segments) if isinstance(segments, list) else None
        whole = rows is not None and all(len(row) == 3 and all(type(n) is int for n in row) for row in rows)
        if unit not in ("steps", "tokens") or not whole or bool(rows) != (unit == "tokens"):
            raise ScheduleError(f"schedule spec: unit {unit!r} with clock {segments!r} is not a clock of llmtrain")
        return cls(unit, rows)  # type: ignore[arg-type]  # checked just above

    @property
    def spec(self) -> list[list[int]]:
        """The segments as JSON."""
        return [list(segment) for segment in self.segments]

    def positions(self, ks: IntArray) -> FloatArray:
        """The position of each update; exact, and continuous where the batch changes."""
        if self.unit == "steps":
            return ks.astype(np.float64)
        table = np.array(self.segments, np.int64)
        row = np.maximum(np.searchsorted(table[:, 0], ks, side="left") - 1, 0)
        tokens: IntArray = table[row, 1] + (ks - table[row, 0]) * table[row, 2]
        return tokens.astype(np.float64)

    def update_at(self, position: int) -> int:
        """The first update whose position is `position` or more."""
        if self.unit == "steps":
            return position
        held = [segment for segment in self.segments if segment[1] < position] or [self.segments[0]]
        update, tokens, per_update = held[-1]
        return update + -(-(position - tokens) // per_update)

    def one_update(self) -> int:
        """What the first update moves the position by."""
        return self.segments[0][2] if self.segments else 1

    def with_batch(self, after_update: int, tokens_per_update: int) -> "Clock":
        """The same clock, with another global batch after update `after_update`."""
        if self.unit == "steps" or self.segments[-1][2] == tokens_per_update:
            return self
        if after_update < self.segments[-1][0] or tokens_per_update < 1:
            raise ScheduleError(
                f"the batch cannot change to {tokens_per_update} tokens after update {after_update}: "
                f"it last changed after update {self.segments[-1][0]}"
            )
        update, tokens, per_update = self.segments[-1]
        segment = (after_update, tokens + (after_update - update) * per_update, tokens_per_update)
        kept = self.segments[:-1] if after_update == update else self.segments
        return Clock(self.unit, (*kept, segment))


@dataclass(frozen=True)
class Scale:
    """What a written length is measured against: the clock's unit, the horizon, the warm-up, one update."""

    unit: ClockUnit
    horizon: int
    warmup: int
    tokens_per_update: int

    @property
    def one_update(self) -> int:
        return self.tokens_per_update if self.unit == "tokens" else 1

    def measure(self, length: Length) -> int:
        """`length` in whole units of the clock; steps and tokens convert at the present batch, percent rounds up."""
        assert length.unit != "auto", "auto has no length of its own"
        if self.unit == "steps":
            return length.updates(self.tokens_per_update, self.horizon)
        if length.unit == "percent":
            return math.ceil(Fraction(str(length.value)) * self.horizon / 100)
        return int(length.value) * (self.tokens_per_update if length.unit == "steps" else 1)

    def read(self, where: str, written: object) -> int:
        """A length the user wrote for a parameter; `auto` is the warm-up, or one update where there is none."""
        try:
            length = Length.parse(written)
        except ValueError as error:
            raise ScheduleError(f"{where}: {error}") from None
        return max(self.warmup, self.one_update) if length.unit == "auto" else self.measure(length)


def automatic_warmup(beta2: float, total_updates: int) -> int:
    """Updates of warm-up for `auto`: max(2 / (1 - beta2), 1 % of the run), at most 10 % of it.

    Ma & Yarats 2019, arXiv:1910.04209 (untuned linear warm-up); the cap follows Porian 2024, arXiv:2406.19146.
    Rounded, not cut: 2 / (1 - 0.95) is 39.99999999999999 in floating point.
    """
    untuned = round(2 / (1 - beta2)) if beta2 < 1 else total_updates
    return min(max(untuned, -(-total_updates // 100)), total_updates // 10)
