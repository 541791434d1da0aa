"""Schedules as a picture for a talk: learning rate over the weight that each update has in the final model.

The lower panel is AdamW's averaging view, c_i in percent of the final weights per percent of the run, so that runs of
any length compare; without weight decay there is none, and it shows the area under the curve instead.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.study.schedule_shown import Shown, drawn_updates, finite, shared_tokens
from llmtrain.study.schedule_view import short

# Okabe & Ito 2008, told apart with any colour vision; yellow is left out, it vanishes on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FULL_KEYS = 5  # schedules that a key has room for with all their numbers
_INK, _FAINT = "#222222", "#6b6b6b"


def write_png(shown: Sequence[Shown], path: Path) -> None:
    """Draw `shown` over one another, 1920 by 1080 pixels."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "text.color": _INK,
        "axes.edgecolor": "#b0b0b0",
        "axes.labelcolor": _INK,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
    }
    with rc_context(style):
        figure = Figure(figsize=(12.8, 7.2), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 1, height_ratios=[2.1, 1], hspace=0.16, left=0.085, right=0.735, top=0.795, bottom=0.085
        )
        upper = figure.add_subplot(grid[0])
        lower = figure.add_subplot(grid[1], sharex=upper)
        updates = drawn_updates(shown)
        for index, one in enumerate(shown):
            _draw(upper, lower, one, updates, index, len(shown))
        _dress(upper, lower, shown, shared_tokens(shown))
        figure.text(0.03, 0.955, title(shown), fontsize=21, fontweight="bold", va="center")
        figure.text(0.03, 0.908, subtitle(shown), fontsize=12.5, color=_FAINT, va="center")
        _key(figure, shown)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def title(shown: Sequence[Shown]) -> str:
    """What the picture is of."""
    return f"Learning rate: {shown[0].label}" if len(shown) == 1 else "Learning-rate schedules"


def subtitle(shown: Sequence[Shown]) -> str:
    """What all schedules in it have in common."""
    last = {one.summary.updates for one in shown}
    peaks = {one.schedule.peak for one in shown}
    warmups = {one.schedule.warmup_updates for one in shown}
    floors = {one.schedule.floor for one in shown}
    parts = [f"{last.pop():,} updates" if len(last) == 1 else ""]
    tokens = shared_tokens(shown)
    if parts[0] and tokens is not None:
        parts.append(f"{count(tokens * shown[0].summary.updates)} tokens")
    parts.append(f"peak {short(peaks.pop())}" if len(peaks) == 1 else "")
    parts.append(f"warm-up {warmups.pop():,} updates" if len(warmups) == 1 else "")
    parts.append(f"floor {floors.pop():g}" if len(floors) == 1 else "")
    return "   ·   ".join(part for part in parts if part)


def key_numbers(one: Shown) -> list[tuple[str, str]]:
    """What stands under a schedule's name in a legend."""
    summary = one.summary
    found = [
        ("mean multiplier", f"{summary.mean_multiplier:.3f}"),
        ("last LR", short(summary.last_lrs[-1])),
        ("area in the decay", f"{summary.decay_share:.0%}"),
    ]
    if finite(summary.bound_ratio) is not None and finite(summary.peak_ratio) is not None:
        found += [("convex bound", f"{summary.bound_ratio:.3f}"), ("suggested peak", f"{summary.peak_ratio:.2f} ×")]  # noqa: RUF001
    return found


def lower_panel(shown: Sequence[Shown]) -> str:
    """The title of the lower panel."""
    decays = {one.weight_decay for one in shown}
    if decays == {0.0}:
        return "Area under the curve so far, in updates at the peak"
    return f"Share of each update in AdamW's final weights, % per 1 % of the run ({_lambda(decays)})"


def shares(one: Shown) -> FloatArray:
    """c_i in percent of the final weights per percent of the run: 1 where all updates count the same."""
    return one.coefficients() * one.summary.updates


def areas(one: Shown) -> FloatArray:
    """Sum of the multipliers through each update."""
    return np.cumsum(one.schedule.multipliers(np.arange(1, one.updates + 1)))


def count(value: float) -> str:
    """100B, 2.5M, 800: a number of tokens."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def _lambda(decays: set[float]) -> str:
    return f"λ = {decays.pop():g}" if len(decays) == 1 else "λ of each run"


def _draw(upper: Any, lower: Any, one: Shown, updates: IntArray, index: int, total: int) -> None:
    """Earlier curves are thicker, so that one lying under another still shows at its rim."""
    line: dict[str, Any] = {
        "color": PALETTE[index % len(PALETTE)],
        "linewidth": 2.2 + 2.0 * (total - 1 - index) / max(total - 1, 1),
    }
    line["linestyle"] = "-" if index < len(PALETTE) else (0, (5, 2))
    own = updates[updates <= one.updates]
    lrs, ran = one.lrs(), one.summary.updates
    within = own[own <= ran]
    upper.plot(within, lrs[within - 1], **line, solid_capstyle="round", solid_joinstyle="round", zorder=3)
    if ran < one.updates:
        beyond = own[own >= ran]
        upper.plot(beyond, lrs[beyond - 1], **{**line, "linestyle": ":", "linewidth": 2}, zorder=2)
    values = areas(one) if one.weight_decay == 0 else shares(one)
    shown = own if one.weight_decay == 0 else within
    lower.plot(shown, values[shown - 1], **line, solid_capstyle="round", zorder=3)


def _dress(upper: Any, lower: Any, shown: Sequence[Shown], tokens: int | None) -> None:
    last = max(one.updates for one in shown)
    upper.text(0, 1.03 if tokens is None else 1.105, "Learning rate", transform=upper.transAxes, fontsize=13)
    lower.set_title(lower_panel(shown), loc="left", fontsize=13, pad=8)
    for panel in (upper, lower):
        panel.grid(axis="y", color="#e6e6e6", linewidth=1)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0, pad=6)
        panel.set_xlim(0, last * 1.01)
        panel.set_ylim(bottom=0)
    upper.yaxis.set_major_formatter(lambda value, place: short(value))
    lower.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("update", loc="right", color=_FAINT)
    if tokens is not None:
        top = upper.secondary_xaxis("top", functions=(lambda k: k * tokens, lambda t: t / tokens))
        top.xaxis.set_major_formatter(lambda value, place: count(value) if value else "")
        top.tick_params(length=0, pad=4)
        top.spines["top"].set_visible(False)
        upper.text(1, 1.105, "tokens", transform=upper.transAxes, color=_FAINT, ha="right")
    for ran in {one.summary.updates for one in shown if one.summary.updates < one.updates}:
        upper.axvline(ran, color=_FAINT, linewidth=1)
        upper.text(ran, 0.04, " the run ends", transform=upper.get_xaxis_transform(), color=_FAINT, fontsize=10.5)


def _key(figure: Any, shown: Sequence[Shown]) -> None:
    """Name, colour and key numbers of each schedule, at the right; smaller where there are many."""
    from matplotlib.lines import Line2D

    wanted = 5 if len(shown) <= _FULL_KEYS else 1
    lines = wanted + 2
    step = min(0.03, 0.7 / (len(shown) * lines))
    size = 12.5 * step / 0.03
    y = 0.785
    for index, one in enumerate(shown):
        colour = PALETTE[index % len(PALETTE)]
        dash: Any = "-" if index < len(PALETTE) else (0, (3, 1.5))
        figure.add_artist(Line2D([0.765, 0.782], [y, y], color=colour, linewidth=4, linestyle=dash))
        name = one.label if len(one.label) < 25 else one.label[:24] + "…"
        figure.text(0.79, y, name, fontsize=1.15 * size, fontweight="bold", color=colour, va="center")
        for number, (what, value) in enumerate(key_numbers(one)[:wanted], start=1):
            height = y - (number + 0.15) * step
            figure.text(0.79, height, what, fontsize=0.88 * size, color=_FAINT, va="center")
            figure.text(0.972, height, value, fontsize=0.88 * size, color=_INK, va="center", ha="right")
        y -= lines * step
    if wanted > 1:
        note = "Bound and suggested peak:\nrelative to linear to zero."
        figure.text(0.79, 0.04, note, fontsize=9.5, color=_FAINT, va="bottom", linespacing=1.4)
