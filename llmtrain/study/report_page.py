"""How is a comparison sent to a colleague? As one HTML file that needs no network and is small enough to mail.

plotly's script alone is 4.8 MB, so curves are drawn by a script of our own, `report_page.js`. Of a run with more rows
than its share of `_POINTS`, the rows are cut into equal blocks, and of each block the first row and those with its
lowest and highest loss are drawn, with the last row of all and the sharpest bends of the learning rate: no extreme is
lost, and every point drawn is a row of the run.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.study.compare import Comparison
from llmtrain.study.readings import Compared
from llmtrain.study.record import RunRecord
from llmtrain.study.report import (
    READINGS,
    Table,
    closing,
    compared_table,
    entries_table,
    peaks_table,
    runs_table,
    sentences,
)

_POINTS = 48_000  # of all training curves together
_FEWEST, _MOST = 300, 3000  # of one
_MOST_VALIDATIONS = 300  # of one run
_BENDS = 16  # of a learning rate
_WIDTH, _HEIGHT = 220, 18  # pixels of the picture of an interval


def write_html(comparison: Comparison, path: Path) -> None:
    """Write the page."""
    here = files("llmtrain.study")
    data = json.dumps(page_data(comparison), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    filled = {
        "SUBTITLE": html.escape(_subtitle(comparison)),
        "ANSWER": _answer(comparison),
        "TABLES": _tables(comparison),
        "NOTES": "".join(f"<li>{html.escape(text)}</li>" for text in [*comparison.warnings, *closing(comparison)]),
        "DATA": data,
        "SCRIPT": here.joinpath("report_page.js").read_text(encoding="utf-8"),
    }
    template = here.joinpath("report_page.html").read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"@([A-Z]+)@", lambda place: filled[place[1]], template), encoding="utf-8")


def page_data(comparison: Comparison) -> dict[str, Any]:
    """What the script draws. Losses keep four decimals, rates and areas five digits."""
    runs = [*comparison.runs, *comparison.set_aside]
    most = min(_MOST, max(_FEWEST, _POINTS // len(runs)))
    cells = list(dict.fromkeys(comparison.cell_of[run.folder] for run in runs))
    return {
        "cells": cells,
        "runs": [_curves(run, cells.index(comparison.cell_of[run.folder]), most) for run in runs],
    }


def drawn_rows(losses: FloatArray, lrs: FloatArray, most: int) -> IntArray:
    """Indices of the rows that are drawn, about `most` of them; see the head of this file."""
    rows = len(losses)
    if rows <= most:
        return np.arange(rows)
    starts = np.linspace(0, rows, max(1, (most - 3 * _BENDS) // 3), endpoint=False).astype(np.int64)
    shown = np.where(np.isfinite(losses), losses, -np.inf)  # a loss that is not finite is an extreme of its own
    kept = [starts, np.array([rows - 1]), np.flatnonzero(~np.isfinite(losses))[:1]]
    for start, stop in zip(starts, [*starts[1:], rows], strict=True):
        kept.append(start + np.array([np.argmin(shown[start:stop]), np.argmax(shown[start:stop])]))
    bends = np.argsort(np.abs(np.diff(lrs, 2)))[-_BENDS:]
    kept += [bends, bends + 1, bends + 2]
    return np.unique(np.concatenate(kept)).astype(np.int64)


def _curves(run: RunRecord, cell: int, most: int) -> dict[str, Any]:
    at = drawn_rows(run.losses, run.lrs, most)
    scored = np.array([row["loss"] for row in run.validations], np.float64)
    rates = np.array([row["lr"] for row in run.validations], np.float64)
    validated = [run.validations[i] for i in drawn_rows(scored, rates, _MOST_VALIDATIONS)]
    return {
        "name": run.name,
        "cell": cell,
        "seed": run.seed,
        "peak": run.peak,
        "training": {
            "steps": run.steps[at].tolist(),
            "tokens": _tokens(run.steps[at], run.tokens[at]),
            "area": _digits(run.areas[at]),
            "lr": _digits(run.lrs[at]),
            "loss": _decimals(run.losses[at]),
        },
        "validation": {
            "steps": [row["step"] for row in validated],
            "tokens": [row["tokens"] for row in validated],
            "area": _digits(run.area_at(row["step"]) for row in validated),
            "lr": _digits(row["lr"] for row in validated),
            "loss": _decimals(row["loss"] for row in validated),
            "annealed": [int(row["decayed"]) for row in validated],
        },
    }


def _tokens(steps: IntArray, tokens: IntArray) -> int | list[int]:
    """Tokens of an update where it is one number, else the tokens at every step."""
    if len(steps) and tokens[0] % steps[0] == 0 and np.array_equal(steps * (tokens[0] // steps[0]), tokens):
        return int(tokens[0] // steps[0])
    return tokens.tolist()  # type: ignore[no-any-return]


def _digits(values: Iterable[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in map(float, values)]


def _decimals(values: Iterable[float]) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in map(float, values)]


def _subtitle(comparison: Comparison) -> str:
    runs = comparison.runs
    cells, seeds = {comparison.cell_of[run.folder] for run in runs}, {run.seed for run in runs}
    tokens = {run.final["tokens"] for run in runs}
    parts = [f"{_count(len(runs), 'run')} of {_count(len(cells), 'schedule')}", _count(len(seeds), "seed")]
    parts += [f"{tokens.pop():,} tokens each"] if len(tokens) == 1 else []
    return ", ".join([*parts, f"compared with {comparison.baseline}"])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _answer(comparison: Comparison) -> str:
    if comparison.mismatches:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in comparison.mismatches)
        return f'<p class="refused">Not ranked: these runs cannot be compared.</p><ul>{items}</ul>'
    parts = []
    for reading in comparison.readings:
        said = sentences(comparison, reading)
        items = "".join(f'<li class="{verdict}">{html.escape(text)}</li>' for verdict, text in said)
        parts.append(f"<h3>{READINGS[reading.name].capitalize()}</h3><ul>{items}</ul>" if said else "")
    return "".join(parts)


def _tables(comparison: Comparison) -> str:
    compared = [
        _table(compared_table(comparison, reading), _pictures(reading.compared, comparison.margin))
        for reading in comparison.readings
        if reading.compared
    ]
    others = (entries_table(comparison), peaks_table(comparison), runs_table(comparison))
    return "".join([*compared, *(_table(table) for table in others if table.rows)])


def _table(table: Table, pictures: Sequence[str] = ()) -> str:
    def row(cells: Sequence[str], tag: str, picture: str) -> str:
        kinds = ["words" if i < table.left else "number" for i in range(len(cells))]
        found = "".join(
            f'<{tag} class="{kind}"{" scope=col" * (tag == "th")}>{html.escape(cell)}</{tag}>'
            for cell, kind in zip(cells, kinds, strict=True)
        )
        return found + (f"<{tag}>{picture}</{tag}>" if pictures else "")

    body = "".join(
        f"<tr>{row(cells, 'td', picture)}</tr>"
        for cells, picture in zip(table.rows, pictures or [""] * len(table.rows), strict=True)
    )
    head = row(table.head, "th", "below | above, the margin grey")
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _pictures(compared: Sequence[Compared], margin: float) -> list[str]:
    """Each difference as a point in its interval, over the margin around 0; one scale for all."""
    found = [one.judgement.difference for one in compared]
    ends = [value for one in found for value in (one.mean, one.low, one.high) if value is not None]
    nats = math.log1p(margin)
    reach = 1.08 * max([nats, *(abs(value) for value in ends if math.isfinite(value))])

    def place(value: float) -> str:
        return f"{_WIDTH / 2 * (1 + min(1.0, max(-1.0, value / reach))):.1f}"

    band = f'<rect x="{place(-nats)}" width="{_WIDTH * nats / reach:.1f}" height="{_HEIGHT}" class="band"/>'
    zero = f'<line x1="{place(0)}" x2="{place(0)}" y2="{_HEIGHT}" class="zero"/>'
    pictures = []
    for one in found:
        line = ""
        if one.low is not None and one.high is not None:
            line = f'<line x1="{place(one.low)}" x2="{place(one.high)}" y1="{_HEIGHT / 2}" y2="{_HEIGHT / 2}"/>'
        point = f'<circle cx="{place(one.mean)}" cy="{_HEIGHT / 2}" r="3.5"/>'
        pictures.append(f'<svg class="interval" aria-hidden="true">{band}{zero}{line}{point}</svg>')
    return pictures
