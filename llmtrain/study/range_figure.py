"""A picture of a range test: loss over learning rate, where it breaks, and which peaks to sweep."""

from collections.abc import Sequence
from pathlib import Path


def write_png(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    edge: float | None,
    peaks: Sequence[float],
    path: Path,
) -> None:
    """Write the figure. `losses` and `smoothed` have one element for each of `rates`, and may not be finite."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), constrained_layout=True)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.semilogx(rates, losses, ".", color="C0", alpha=0.35, label="one batch")
    axes.semilogx(rates, smoothed, color="C0", label="median of five")
    if edge is not None and peaks:
        axes.axvline(edge, color="C3", linestyle="--", label=f"edge {edge:.2g}")
        axes.axvspan(peaks[0], peaks[-1], color="C2", alpha=0.2, label=f"sweep {peaks[0]:g} to {peaks[-1]:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss before the update (nats per token)")
    axes.set_title("Learning-rate range test")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
