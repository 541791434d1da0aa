"""Which run predicts held-out text better, at the same number of tokens?

Reads run folders alone. Runs that differ in data, tokenizer, validation set, model or tokens seen are not ranked
against each other: the report says in what they differ. No torch here.
"""

from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.config_file import load_config
from llmtrain.data.manifest import Baseline, load_manifest
from llmtrain.errors import DataError
from llmtrain.train.metrics import read_metrics

MUST_AGREE = {
    "tokens": "tokens seen",
    "data_hash": "data",
    "tokenizer_hash": "tokenizer",
    "set_hash": "validation set",
    "model_hash": "model",
    "initial_weights": "initial weights",
}


class RunCurve(NamedTuple):
    """One run's history."""

    name: str
    schedule: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]  # of the set `validation`, in order

    @property
    def final(self) -> dict[str, Any]:
        return self.validations[-1]


class Comparison(NamedTuple):
    """Runs, the best first, with what they must share and what a model without context reaches."""

    runs: list[RunCurve]
    mismatches: list[str]
    baselines: dict[str, Baseline]


def compare(run_dirs: list[Path]) -> Comparison:
    """Read the runs and rank them by final validation loss, where they may be ranked; else keep the order given."""
    runs = [read_curve(path) for path in run_dirs]
    mismatches = [
        f"{what} differ: " + ", ".join(f"{run.name} {run.final[key]}" for run in runs)
        for key, what in MUST_AGREE.items()
        if len({run.final[key] for run in runs}) > 1
    ]
    if not mismatches:
        runs.sort(key=lambda run: float(run.final["loss"]))
    return Comparison(runs, mismatches, _baselines(run_dirs))


def read_curve(run_dir: Path) -> RunCurve:
    """The history of one run. Raises DataError where it was never validated."""
    rows = read_metrics(run_dir)
    validations = [row for row in rows if row["kind"] == "validation" and row["set"] == "validation"]
    if not validations:
        raise DataError(f"{run_dir} has no validation yet: let it train, or look at its log")
    steps = [row for row in rows if row["kind"] == "step"]
    return RunCurve(run_dir.name, validations[-1]["schedule"], steps, validations)


def tokens_per_s(run: RunCurve) -> float | None:
    """Median over the updates, the first of each attempt left out."""
    speeds = sorted(row["tokens_per_s"] for row in run.steps[1:])
    return speeds[len(speeds) // 2] if speeds else None


def as_json(comparison: Comparison) -> dict[str, Any]:
    """What `--json` prints."""
    runs = [
        {
            "run": run.name,
            "schedule": run.schedule,
            "schedule_hash": run.final["schedule_hash"],
            "step": run.final["step"],
            "tokens": run.final["tokens"],
            "loss": run.final["loss"],
            "perplexity": run.final["perplexity"],
            "nats_per_byte": run.final["nats_per_byte"],
            "decayed": run.final["decayed"],
            "tokens_per_s": tokens_per_s(run),
        }
        for run in comparison.runs
    ]
    baselines = {name: baseline.model_dump() for name, baseline in comparison.baselines.items()}
    return {
        "ranked": not comparison.mismatches,
        "mismatches": comparison.mismatches,
        "runs": runs,
        "baselines": baselines,
    }


def _baselines(run_dirs: list[Path]) -> dict[str, Baseline]:
    """Uniform and unigram predictors on the same validation set, where the data is still there."""
    try:
        manifest = load_manifest(load_config(run_dirs[0] / "config.yaml").data.path)
    except Exception:  # a report must not fail because data or config moved away
        return {}
    return {"uniform": manifest.uniform, "unigram": manifest.unigram}
