"""A schedule for the eye, in 80 columns: a plot made of characters, and its numbers in words.

One schedule is drawn in blocks, several as lines of letters, A the first.
"""

from collections.abc import Callable, Sequence

import numpy as np

from llmtrain.schedules.exact import FloatArray
from llmtrain.study.schedule_shown import Shown, finite

Paint = Callable[[str, int], str]  # a text and the index of its schedule -> the text in that one's colour

_BLOCKS = " ▁▂▃▄▅▆▇█"
_TITLE_WIDTH = 24
_CELL_WIDTH = 14
_TENTHS = 10
NOTES = (
    "EMA: AdamW's final weights are an average of its updates, in which update i has",
    "weight c_i = eta_i lambda prod(1 - eta_j lambda) over later j. Convex bound: a",
    "worst case over convex problems, and the peak it favours, relative to linear to",
    "zero; it ranks shapes and centres a sweep of peaks, and is no loss.",
)


def plain(text: str, index: int) -> str:
    """No colour."""
    return text


def terminal_plot(shown: Sequence[Shown], paint: Paint = plain, width: int = 68, height: int = 14) -> str:
    """Learning rate against update."""
    curves = [one.lrs() for one in shown]
    last = max(len(curve) for curve in curves)
    columns = np.linspace(0, last - 1, min(width, last)).astype(int)
    top = max(float(curve.max()) for curve in curves) or 1.0
    levels = [curve[columns[columns < len(curve)]] / top for curve in curves]
    rows = _blocks(levels[0], height) if len(shown) == 1 else _letters(levels, height, len(columns))
    labels = {0: f"{short(top)}", height // 2: f"{short(top / 2)}"}
    if len(shown) > 1:
        labels[height - 1] = "0"
    lines = []
    for row, cells in enumerate(rows):
        painted = "".join(paint(cell, _owner(cell)) for cell in cells) if len(shown) > 1 else paint("".join(cells), 0)
        lines.append(f"{labels.get(row, ''):>9} ┤{painted}".rstrip())
    lines.append(" " * 10 + "└" + "─" * len(columns))
    first = "update 1"
    lines.append(" " * 11 + first + f"{last:>{max(1, len(columns) - len(first))},}")
    if len(shown) > 1:
        lines += [" " * 11 + paint(f"{letter(index)} {one.label}", index) for index, one in enumerate(shown)]
        lines.append(" " * 11 + "* where they meet")
    return "\n".join(lines)


def table(shown: Sequence[Shown], paint: Paint = plain) -> str:
    """The numbers of each schedule in a column, four to a block."""
    blocks = []
    for start in range(0, len(shown), 4):
        part = shown[start : start + 4]
        found = [numbers(one) for one in part]
        lines = []
        if len(shown) > 1:
            names = [f"{letter(start + i)} {one.label}" for i, one in enumerate(part)]
            heads = [paint(f"{_cut(name):>{_CELL_WIDTH}}", start + i) for i, name in enumerate(names)]
            lines.append(" " * _TITLE_WIDTH + "".join(heads))
        for title in found[0]:
            lines.append(f"{title:<{_TITLE_WIDTH}}" + "".join(f"{one[title]:>{_CELL_WIDTH}}" for one in found))
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def warnings(shown: Sequence[Shown]) -> list[str]:
    """One line a warning, with the schedule's name where there are several."""
    return [
        f"warning: {one.label + ': ' if len(shown) > 1 else ''}{text}" for one in shown for text in one.summary.warnings
    ]


def numbers(one: Shown) -> dict[str, str]:
    """What a schedule amounts to, title by title; all schedules have the same titles."""
    summary = one.summary
    window = "endless" if summary.averaging_window is None else f"{summary.averaging_window:,.0f}"
    coefficients = one.coefficients()
    firsts = {f"LR of update {i + 1}": _nth(summary.first_lrs, i) for i in range(3)}
    lasts = {
        title: _nth(summary.last_lrs, place)
        for title, place in (("third last LR", -3), ("second last LR", -2), ("last LR", -1))
    }
    return {
        "updates": f"{summary.updates:,}",
        **firsts,
        **lasts,
        "peak LR": f"{summary.peak_lr:.6g}",
        "peak at update": f"{summary.peak_update:,}",
        "area": f"{summary.area:.6g}",
        "mean multiplier": f"{summary.mean_multiplier:.4f}",
        "area in the decay": f"{summary.decay_share:.1%}",
        "sum of squares": f"{summary.sum_of_squares:.6g}",
        "last 1 / (eta lambda)": window,
        "EMA c_i, by tenths": sparkline(coefficients),
        "half of the EMA: last": half_of(coefficients),
        "EMA of initial weights": f"{max(0.0, 1 - float(coefficients.sum())):.1%}",
        "convex bound": _ratio(summary.bound_ratio),
        "suggested peak ratio": _ratio(summary.peak_ratio),
        "hash begins with": one.schedule.hash[:12],
    }


def sparkline(coefficients: FloatArray) -> str:
    """The share of each tenth of the run, as ten blocks."""
    shares = [float(part.sum()) for part in np.array_split(coefficients, _TENTHS)]
    top = max(shares) or 1.0
    return "".join(_BLOCKS[max(1, round(share / top * 8))] if share else "·" for share in shares)


def half_of(coefficients: FloatArray) -> str:
    """The number of last updates that hold half of all coefficients."""
    total = float(coefficients.sum())
    if total == 0:
        return "-"
    return f"{int(np.searchsorted(np.cumsum(coefficients[::-1]), total / 2)) + 1:,}"


def short(value: float) -> str:
    """A learning rate as one says it: 3e-4, 0.02."""
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def letter(index: int) -> str:
    """The character of a curve."""
    return chr(ord("A") + index % 26)


def _nth(values: tuple[float, ...], place: int) -> str:
    return f"{values[place]:.6g}" if -len(values) <= place < len(values) else "-"


def _ratio(value: float) -> str:
    return "-" if finite(value) is None else f"{value:.3f}"


def _cut(text: str) -> str:
    return text if len(text) < _CELL_WIDTH else text[: _CELL_WIDTH - 2] + "…"


def _owner(cell: str) -> int:
    return ord(cell) - ord("A") if cell.isalpha() else -1


def _blocks(level: FloatArray, height: int) -> list[list[str]]:
    eighths = np.round(level * height * 8).astype(int)
    return [[_BLOCKS[max(0, min(8, int(value) - 8 * row))] for value in eighths] for row in range(height - 1, -1, -1)]


def _letters(levels: list[FloatArray], height: int, width: int) -> list[list[str]]:
    rows = [[" "] * width for _ in range(height)]
    for index, level in enumerate(levels):
        places = (height - 1 - np.round(level * (height - 1)).astype(int)).tolist()
        for column, place in enumerate(places):
            before = places[column - 1] if column else place
            step = 1 if before < place else -1
            for row in [*range(before + step, place, step), place]:
                cell = rows[row][column]
                rows[row][column] = letter(index) if cell in (" ", letter(index)) else "*"
    return rows
