"""A picture of runs: validation and training loss over the learning rate, against tokens. A colour is a schedule."""

from pathlib import Path

import numpy as np

from llmtrain.schedules.exact import FloatArray
from llmtrain.study.compare import Comparison

_SMOOTHING = 0.9
_NAMED = 12  # that a key has room for


def loss_and_lr(comparison: Comparison, path: Path) -> None:
    """Write a PNG with loss above and learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 7), constrained_layout=True)
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    runs = [*comparison.runs, *comparison.set_aside]
    cells = list(dict.fromkeys(comparison.cell_of[run.folder] for run in runs))
    each = len(runs) <= _NAMED  # else one line of the key for a schedule
    for index, run in enumerate(runs):
        cell = comparison.cell_of[run.folder]
        color, style = f"C{cells.index(cell) % 10}", "-" if cells.index(cell) < 10 else "--"
        again = any(comparison.cell_of[other.folder] == cell for other in runs[:index])
        named = f"{run.name}: {cell}, perplexity {run.final['perplexity']:.2f}" if each else None if again else cell
        tokens = [row["tokens"] for row in run.validations]
        losses = [row["loss"] for row in run.validations]
        loss.plot(tokens, losses, style, color=color, marker="o", markersize=4 if each else 2, label=named)
        loss.plot(run.tokens, _smooth(run.losses), color=color, alpha=0.35, linewidth=1)
        rate.plot(run.tokens, run.lrs, style, color=color)
    loss.set_ylabel("loss (nats per token)")
    loss.set_title("Validation loss (points) and training loss (smoothed, faint)")
    loss.legend(fontsize="medium" if len(runs) < 8 else "small")
    loss.grid(alpha=0.3)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens")
    rate.xaxis.set_major_formatter(EngFormatter(sep=""))
    rate.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _smooth(losses: FloatArray) -> FloatArray:
    """Exponential moving average, started at its first value."""
    from scipy.signal import lfilter

    if not len(losses):
        return losses
    smoothed: FloatArray = lfilter([1 - _SMOOTHING], [1, -_SMOOTHING], losses, zi=[_SMOOTHING * losses[0]])[0]
    return np.asarray(smoothed)
