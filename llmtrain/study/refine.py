"""Which schedule do the gradient norms of a pilot run ask for?

Defazio 2023, arXiv:2310.07831: the rate of update k is to be proportional to w_k times the sum of all later w, where
w = 1 / G, and G is the norm of the gradient in the pilot run, smoothed by a running median over a tenth of it. Equal
norms give the straight line to zero; norms that are large at first give a warm-up. The paper takes 1-norms for Adam; a
run logs 2-norms, before they are clipped.

What comes out is a `refined` section with the norms in it, medians of equal blocks, so it can be run anywhere. It gives
the shape alone: the peak is the pilot's and has to be tuned anew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config import Config, ScheduleConfig
from llmtrain.config_file import load_config, read_section
from llmtrain.errors import DataError
from llmtrain.schedules import Schedule, plan
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.schedules.summary import summarize
from llmtrain.study.schedule_shown import Shown
from llmtrain.train.metrics import METRICS_FILE, read_metrics

BLOCKS = 200  # norms in a section: the median over a tenth of the run leaves nothing finer
FEWEST = 100  # updates of a pilot run


@dataclass(frozen=True)
class Refined:
    """A refined schedule, and what to know of it."""

    section: dict[str, Any]  # `schedule` of a config
    shown: list[Shown]  # it, and the pilot's own where that can be planned from its config
    derived: list[str]  # what came out, in words
    warnings: list[str]


def refine(run: Path) -> Refined:
    """Derive a schedule from the norms that `run` logged. Raises DataError for rows that cannot be used."""
    rows = [row for row in read_metrics(run) if row["kind"] == "step"]
    config = load_config(run / "config.yaml")
    norms = _norms(f"{run / METRICS_FILE}", rows)
    blocks = np.array_split(norms, min(len(norms), BLOCKS))
    whole = len(norms) == config.total_updates
    section = {
        "name": "refined",
        "peak": config.schedule.peak,
        "horizon": str(config.schedule.horizon) if whole else f"{len(norms)} steps",
        "warmup": 0,
        "floor": 0.0,
        "optimizer": "adam",
        "norms": [float(f"{np.median(block):.5g}") for block in blocks],
    }
    schedule = plan(read_section(ScheduleConfig, section, "schedule"), config.batch.tokens)
    return Refined(section, _shown(config, schedule), _derived(schedule), _warnings(config, norms))


def _norms(where: str, rows: list[dict[str, Any]]) -> FloatArray:
    """The norm of every update, from the first to the last."""
    if len(rows) < FEWEST:
        raise DataError(f"{where} has {len(rows)} updates, wanted {FEWEST} or more: let the pilot run train longer")
    steps: IntArray = np.array([row["step"] for row in rows], np.int64)
    if steps[0] != 1:
        raise DataError(
            f"{where} starts at update {steps[0]}, wanted the norms from update 1 on: use a pilot run that is no branch"
        )
    gaps = np.flatnonzero(np.diff(steps) != 1)
    if len(gaps):
        before, after = steps[gaps[0]], steps[gaps[0] + 1]
        raise DataError(f"{where}: after update {before} comes {after}: rows are missing, use another pilot run")
    for row in rows:
        norm = row.get("grad_norm")
        if not isinstance(norm, int | float) or not np.isfinite(norm) or norm <= 0:
            raise DataError(
                f"{where}: grad_norm of update {row['step']} is {norm}, wanted a finite number above 0: use a pilot "
                "run that did not diverge"
            )
    return np.array([row["grad_norm"] for row in rows], np.float64)


def _shown(config: Config, schedule: Schedule) -> list[Shown]:
    decay = config.optim.weight_decay
    schedules = {"refined": schedule}
    if "module" not in config.schedule.shape:  # a report runs no code of a run folder
        schedules[config.run.name] = plan(config.schedule, config.batch.tokens, config.optim.betas[1])
    return [Shown(label, one, summarize(one, decay), decay, config.batch.tokens) for label, one in schedules.items()]


def _derived(schedule: Schedule) -> list[str]:
    """Warm-up and decay, as they came out."""
    total = schedule.total_updates
    e = schedule.multipliers(np.arange(1, total + 1))
    top = int(np.argmax(e))

    def place(update: int) -> str:
        return f"update {update:,} ({update / total:.1%})"

    half, tenth = (top + 1 + int(np.argmax(e[top:] <= level)) for level in (0.5, 0.1))
    rise = f"no warm-up: it starts at {e[0]:.2f} of its peak" if e[0] > 0.9 else f"warm-up from {e[0]:.2f} of the peak"
    return [
        f"{rise}, the peak comes at {place(top + 1)}",
        f"decay to half the peak at {place(half)}, to a tenth at {place(tenth)}, to {e[-1]:.2g} at the end",
        f"mean multiplier {e.mean():.3f}",
    ]


def _warnings(config: Config, norms: FloatArray) -> list[str]:
    found = [
        "the log has the 2-norm of the gradient; for Adam the paper takes the 1-norm",
        f"the peak is the pilot's, {config.schedule.peak:g}: the shape is new, so sweep it",
    ]
    clip = config.optim.clip
    share = 0.0 if clip is None else float(np.mean(norms > clip))
    if share:
        found.append(
            f"norms are those before clipping; the pilot clipped {share:.0%} of its updates to {clip:g}, and clipping "
            "already does there a part of what the refined schedule does"
        )
    if len(norms) < config.total_updates:
        found.append(
            f"the pilot made {len(norms):,} of its {config.total_updates:,} updates; the schedule ends where it ended"
        )
    return found
