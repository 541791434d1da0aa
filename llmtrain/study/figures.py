"""A picture of runs: validation and training loss over the learning rate, against tokens."""

from pathlib import Path
from typing import Any

from llmtrain.study.compare import RunCurve

_SMOOTHING = 0.9


def loss_and_lr(runs: list[RunCurve], path: Path) -> None:
    """Write a PNG with loss above and learning rate below."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, (loss, rate) = plt.subplots(
        2, 1, figsize=(9, 7), sharex=True, gridspec_kw={"height_ratios": [3, 1]}, constrained_layout=True
    )
    for run in runs:
        (line,) = loss.plot(
            [row["tokens"] for row in run.validations],
            [row["loss"] for row in run.validations],
            marker="o",
            markersize=4,
            label=f"{run.name}: {run.schedule}, perplexity {run.final['perplexity']:.2f}",
        )
        tokens = [row["tokens"] for row in run.steps]
        loss.plot(tokens, _smooth(run.steps), color=line.get_color(), alpha=0.35, linewidth=1)
        rate.plot(tokens, [row["lr"] for row in run.steps], color=line.get_color())
    loss.set_ylabel("loss (nats per token)")
    loss.set_title("Validation loss (points) and training loss (smoothed, faint)")
    loss.legend()
    loss.grid(alpha=0.3)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens")
    rate.xaxis.set_major_formatter(EngFormatter(sep=""))
    rate.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _smooth(rows: list[dict[str, Any]]) -> list[float]:
    """Exponential moving average, started at its first value."""
    smoothed: list[float] = []
    for row in rows:
        before = smoothed[-1] if smoothed else row["loss"]
        smoothed.append(_SMOOTHING * before + (1 - _SMOOTHING) * row["loss"])
    return smoothed
