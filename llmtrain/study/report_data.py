"""What does a comparison hold for a program? JSON of everything that is reported, CSV of every validation.

The numbers are those of `llmtrain.study.report`, with all their digits; what is not finite is null.
"""

import csv
import math
from pathlib import Path
from typing import Any

from llmtrain.study.compare import Comparison
from llmtrain.study.readings import Compared
from llmtrain.study.record import RunRecord
from llmtrain.study.report import sentences

CSV_COLUMNS = (
    *("run", "schedule", "cell", "seed", "peak", "step", "tokens", "area", "lr", "loss", "perplexity"),
    *("nats_per_byte", "annealed", "final", "finished"),
)


def as_json(comparison: Comparison, *, speeds: bool = False) -> dict[str, Any]:
    """Everything that is reported. With `speeds`, what the clock had a part in too."""
    return {
        "ranked": not comparison.mismatches,
        "mismatches": comparison.mismatches,
        "baseline": comparison.baseline,
        "margin": comparison.margin,
        "runs": [_run_json(comparison, run, speeds) for run in (*comparison.runs, *comparison.set_aside)],
        "baselines": {name: one.model_dump() for name, one in comparison.baselines.items()},
        "schedules": [
            {
                "schedule": entry.cell,
                "peak": entry.peak,
                "area": _finite(entry.area),
                "seeds": sorted(entry.runs),
                "loss": _finite(entry.loss),
                "deviation": _finite(entry.deviation),
                "annealed": entry.annealed,
            }
            for entry in comparison.entries
        ],
        "peaks": {
            cell: {
                "best": fit.best,
                "edge": fit.edge,
                "optimum": fit.optimum,
                "loss": fit.loss,
                "rise_at_half_and_double": fit.rise,
            }
            for cell, fit in comparison.fits.items()
        },
        "readings": {
            reading.name: {
                "allowed": bool(reading.compared),
                "missing": reading.missing,
                "compared": [_compared_json(one) for one in reading.compared],
                "sentences": [text for _, text in sentences(comparison, reading)],
            }
            for reading in comparison.readings
        },
        "warnings": comparison.warnings,
    }


def write_csv(comparison: Comparison, path: Path) -> None:
    """One row for every validation of every run, every digit of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for run in (*comparison.runs, *comparison.set_aside):
            for row in run.validations:
                writer.writerow(
                    [
                        *(run.name, run.schedule, comparison.cell_of[run.folder], run.seed, run.peak),
                        *(row["step"], row["tokens"], run.area_at(row["step"]), row["lr"], row["loss"]),
                        *(row["perplexity"], row["nats_per_byte"], row["decayed"]),
                        *(row is run.final, not run.unfinished),
                    ]
                )


def _run_json(comparison: Comparison, run: RunRecord, speeds: bool) -> dict[str, Any]:
    final = run.final
    row = None if comparison.target is None else run.reached(comparison.target)
    return {
        "run": run.name,
        "schedule": run.schedule,
        "schedule_hash": final["schedule_hash"],
        "cell": comparison.cell_of[run.folder],
        "seed": run.seed,
        "peak": run.peak,
        "area": _finite(run.area),
        "step": final["step"],
        "tokens": final["tokens"],
        "loss": _finite(run.loss),
        "perplexity": _finite(final["perplexity"]),
        "nats_per_byte": _finite(final["nats_per_byte"]),
        "decayed": final["decayed"],
        **({"tokens_per_s": run.tokens_per_s} if speeds else {}),
        "spikes": run.spikes,
        "rate_error": run.rate_error,
        "finished": not run.unfinished,
        "unfinished": run.unfinished,
        "at_target": row and {key: row[key] for key in ("step", "tokens", "loss", "decayed")},
    }


def _compared_json(one: Compared) -> dict[str, Any]:
    found = one.judgement.difference
    return {
        "schedule": one.ours.cell,
        "peak": one.ours.peak,
        "against": one.theirs.cell,
        "against_peak": one.theirs.peak,
        "nats": _finite(found.mean),
        "perplexity_percent": _finite(100 * math.expm1(found.mean)) if found.mean < 700 else None,
        "interval": None if found.low is None else [found.low, found.high],
        "seeds": found.seeds,
        "paired": found.paired,
        "deviation": found.deviation,
        "p": found.p,
        "p_holm": one.judgement.p,
        "p_equivalent_holm": one.judgement.p_equivalent,
        "verdict": one.judgement.verdict,
        "seeds_needed": one.judgement.seeds_needed,
        "text_noise": None if one.noise is None else [one.noise.low, one.noise.high],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
