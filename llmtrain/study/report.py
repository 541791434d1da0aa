"""What does a comparison say, in words and in tables?

Losses are nats per token, differences (this one) - (baseline), areas learning rate times updates. Where there is no
interval, none is printed.
"""

import math
from typing import NamedTuple

from llmtrain.study.compare import Comparison
from llmtrain.study.readings import AREA_TOLERANCE, Compared, Reading, named
from llmtrain.study.record import RunRecord
from llmtrain.study.statistics import LEVEL, Judgement

READINGS = {
    "best peak": "each at its own best peak",
    "same area": "at the same area under the learning rates",
    "same peak": "at the same peak",
}


class Table(NamedTuple):
    """Text in columns; the first `left` columns are words, the others numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    left: int


def runs_table(comparison: Comparison, *, speeds: bool = False) -> Table:
    """One row a run, the best first; columns in which all runs agree are left out where they say little.

    Written reports have no `speeds`: the same runs give the same bytes, however often they were interrupted.
    """
    runs = [*comparison.runs, *comparison.set_aside]
    seeds, peaks = len({run.seed for run in runs}) > 1, len({run.peak for run in runs}) > 1
    target = comparison.target
    head = ["run", "schedule", *(["seed"] if seeds else []), *(["peak"] if peaks else [])]
    head += ["tokens", "val loss", "perplexity", "nats/byte", *(["tokens/s"] if speeds else [])]
    head += [f"updates to {target:g}", f"tokens to {target:g}"] if target is not None else []
    rows = []
    for run in runs:
        row = [run.name, comparison.cell_of[run.folder] + _mark(run)]
        row += [str(run.seed)] if seeds else []
        row += [f"{run.peak:g}"] if peaks else []
        speed = "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}"
        final = run.final
        row += [f"{final['tokens']:,}", f"{run.loss:.4f}", f"{final['perplexity']:.2f}"]
        row += [f"{final['nats_per_byte']:.4f}", *([speed] if speeds else [])]
        row += _reached(run, target) if target is not None else []
        rows.append(row)
    for name, one in comparison.baselines.items():
        row = [f"({name})"] + [""] * (len(head) - 1)
        row[head.index("perplexity")] = f"{one.perplexity:.2f}"
        row[head.index("nats/byte")] = f"{one.nats_per_byte:.4f}"
        rows.append(row)
    return Table("Runs", head, rows, 2)


def entries_table(comparison: Comparison) -> Table:
    """One row for every schedule and peak: what its seeds reached."""
    head = ["schedule", "peak", "area", "seeds", "val loss", "+- seed", "perplexity", "spikes"]
    rows = [
        [
            entry.cell + ("" if entry.annealed else " (not annealed)"),
            f"{entry.peak:g}",
            "unknown" if math.isnan(entry.area) else f"{entry.area:.4g}",
            str(len(entry.runs)),
            f"{entry.loss:.4f}",
            "" if entry.deviation is None else f"{entry.deviation:.4f}",
            f"{math.exp(entry.loss):.2f}" if entry.loss < 700 else "inf",
            str(sum(run.spikes for run in entry.runs.values())),
        ]
        for entry in comparison.entries
    ]
    return Table("Schedules", head, rows, 1)


def peaks_table(comparison: Comparison) -> Table:
    """One row for every schedule that was run at several peaks: where its best is, and how much it matters."""
    head = ["schedule", "best run", "parabola's best", "its loss", "rise at 1/2 and 2 x", "edge"]
    rows = [
        [
            cell,
            f"{fit.best:g}",
            *(["", "", ""] if fit.optimum is None else [f"{fit.optimum:.3g}", f"{fit.loss:.4f}", f"{fit.rise:.4f}"]),
            fit.edge and f"{fit.edge} of the grid",
        ]
        for cell, fit in comparison.fits.items()
    ]
    return Table("Peaks", head, rows, 1)


def compared_table(comparison: Comparison, reading: Reading) -> Table:
    """One row for every comparison of a reading."""
    head = ["schedule", "against", "nats", "95 %", "perplexity", "Holm p", "seeds", "text noise", "verdict"]
    rows = [
        [
            named(one.ours, comparison.entries),
            named(one.theirs, comparison.entries),
            f"{one.judgement.difference.mean:+.4f}",
            _interval(one.judgement),
            _percent(one.judgement.difference.mean),
            "" if one.judgement.p is None else _p(one.judgement.p),
            f"{one.judgement.difference.seeds}{'' if one.judgement.difference.paired else ', not paired'}",
            "" if one.noise is None else f"+-{1.96 * one.noise.deviation:.4f}",
            one.judgement.verdict,
        ]
        for one in reading.compared
    ]
    return Table(READINGS[reading.name].capitalize(), head, rows, 2)


def sentences(comparison: Comparison, reading: Reading) -> list[tuple[str, str]]:
    """What a reading says: a verdict and a sentence for every comparison, then ("missing", what it cannot say)."""
    said: list[tuple[str, str]] = [
        (one.judgement.verdict, _sentence(comparison, reading, one)) for one in reading.compared
    ]
    return [*said, ("missing", reading.missing)] if reading.missing else said


def closing(comparison: Comparison) -> list[str]:
    """What holds for the whole report."""
    compared = [one for reading in comparison.readings for one in reading.compared]
    said = []
    if compared and all(one.judgement.verdict == "one seed" for one in compared):
        said.append(
            "one seed a schedule: run each with three or more values of run.seed to know what another seed would give"
        )
    if compared and all(one.noise is None for one in compared):
        said.append("noise of the validation text is not known: no runs kept what each of many documents cost them")
    return said


def markdown(comparison: Comparison) -> str:
    """The report for a merge request or a notebook."""
    parts = ["# Comparison of learning-rate schedules\n"]
    if comparison.mismatches:
        parts.append("**Not ranked: these runs cannot be compared.**\n")
        parts.append("".join(f"- {text}\n" for text in comparison.mismatches))
    for reading in comparison.readings:
        parts.append(f"## {READINGS[reading.name].capitalize()}\n")
        parts.append("".join(f"- {text}\n" for _, text in sentences(comparison, reading)))
        if reading.compared:
            parts.append(_markdown_table(compared_table(comparison, reading)))
    for table in (entries_table(comparison), peaks_table(comparison), runs_table(comparison)):
        if table.rows:
            parts.append(f"## {table.title}\n")
            parts.append(_markdown_table(table))
    notes = [*comparison.warnings, *closing(comparison)]
    if notes:
        parts.append("## To keep in mind\n")
        parts.append("".join(f"- {text}\n" for text in notes))
    return "\n".join(parts)


def _sentence(comparison: Comparison, reading: Reading, one: Compared) -> str:
    found = one.judgement.difference
    ours, theirs = named(one.ours, comparison.entries), named(one.theirs, comparison.entries)
    side = "below" if found.mean < 0 else "above"
    said = f"{ours} ends {abs(found.mean):.4f} nats ({_percent(found.mean)} perplexity) {side} {theirs}"
    said += f" {READINGS[reading.name]}"
    ratio = one.ours.area / one.theirs.area if one.theirs.area > 0 else math.nan
    if reading.name == "same peak" and abs(ratio - 1) > AREA_TOLERANCE:
        said += f" with {ratio:.2f} times its area"
    if found.low is None:
        how = "one seed in common" if found.paired else "no seed in common"
        said += f": {how}, so another seed may turn it round, and no interval is claimed"
    else:
        how = f"over {found.seeds} seeds" + ("" if found.paired else ", not paired, because the seeds differ")
        said += f", 95 % {_interval(one.judgement)} {how}: {_verdict(comparison, reading, one)}"
    raw = [entry for entry in (one.ours, one.theirs) if not entry.annealed]
    if raw:
        said += f"; not annealed at the end: {' and '.join(named(entry, comparison.entries) for entry in raw)}"
    if one.noise is not None:
        said += (
            f"; other validation text would move it by +-{1.96 * one.noise.deviation:.4f} nats "
            f"({one.noise.low:+.4f} to {one.noise.high:+.4f})"
        )
    return said + "."


def _verdict(comparison: Comparison, reading: Reading, one: Compared) -> str:
    judged, margin = one.judgement, f"{100 * comparison.margin:g} % of perplexity"
    small = judged.p_equivalent is not None and judged.p_equivalent < LEVEL
    if judged.verdict in ("better", "worse"):
        p = _p(judged.p or 0.0)
        return f"{judged.verdict} (Holm p {p})" + (f", by less than {margin}" if small else "")
    if judged.verdict == "equivalent":
        return f"equivalent, a difference of {margin} or more is ruled out"
    needed = f"about {judged.seeds_needed} seeds would show a difference of {margin}"
    found = judged.difference
    if found.low is not None and found.high is not None and not found.low <= 0 <= found.high:
        return f"not shown where {len(reading.compared)} schedules are compared at once; {needed}"
    return f"not resolvable; {needed}"


def _interval(judged: Judgement) -> str:
    found = judged.difference
    return "" if found.low is None or found.high is None else f"{found.low:+.4f} to {found.high:+.4f}"


def _percent(nats: float) -> str:
    return f"{100 * math.expm1(nats):+.2f} %" if nats < 700 else "inf"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _mark(run: RunRecord) -> str:
    if run.unfinished:
        return " (did not finish)"
    return "" if run.final["decayed"] else " (not annealed)"


def _reached(run: RunRecord, target: float) -> list[str]:
    row = run.reached(target)
    return ["never", "never"] if row is None else [f"{row['step']:,}", f"{row['tokens']:,}"]


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---" if i < table.left else "---:" for i in range(len(table.head))], *table.rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
