"""A schedule for the eye: a plot made of characters, and its numbers in words."""

import numpy as np
from numpy.typing import NDArray

from llmtrain.schedules import Schedule
from llmtrain.schedules.summary import Summary

_BLOCKS = " ▁▂▃▄▅▆▇█"


def terminal_plot(lrs: NDArray[np.float64], width: int = 72, height: int = 12) -> str:
    """Learning rate against update as `height` lines of block characters."""
    columns = lrs[np.linspace(0, len(lrs) - 1, min(width, len(lrs))).astype(int)]
    top = float(lrs.max()) or 1.0
    eighths = np.round(columns / top * height * 8).astype(int)
    lines = []
    for row in range(height - 1, -1, -1):
        cells = "".join(_BLOCKS[max(0, min(8, int(value) - 8 * row))] for value in eighths)
        label = f"{top * (row + 1) / height:.2e}" if row in (height - 1, height // 2 - 1) else " " * 8
        lines.append(f"{label} ┤{cells}")
    lines.append(" " * 9 + "└" + "─" * len(columns))
    lines.append(" " * 10 + f"update 1{f'update {len(lrs)}':>{max(1, len(columns) - 8)}}")
    return "\n".join(lines)


def summary_lines(schedule: Schedule, summary: Summary) -> list[str]:
    """What a schedule amounts to, a line a fact."""
    window = "without end" if summary.averaging_window is None else f"{summary.averaging_window:,.0f} updates"
    lines = [
        f"{schedule.name}  {schedule.hash}  {summary.updates} updates",
        f"first LRs          {'  '.join(f'{lr:.6g}' for lr in summary.first_lrs)}",
        f"last LRs           {'  '.join(f'{lr:.6g}' for lr in summary.last_lrs)}",
        f"peak               {summary.peak_lr:.6g} at update {summary.peak_update}",
        f"area               {summary.area:.6g}  (mean multiplier {summary.mean_multiplier:.4f})",
        f"share in the decay {summary.decay_share:.1%}",
        f"averaging window   {window} at the end (AdamW's weight decay as an average)",
        f"convex bound       {summary.bound_ratio:.3f} of linear to zero, at {summary.peak_ratio:.2f} of its best peak",
    ]
    return lines + [f"warning: {warning}" for warning in summary.warnings]
