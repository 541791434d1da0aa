"""How is a fitted law reported and kept? As one JSON object, which `read_law` reads again.

Lengths of updates and areas are in thousands, learning rates in multiples of the fitted peak, losses in nats per token.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.errors import DataError, EnvironmentError, did_you_mean
from llmtrain.study.law import laws
from llmtrain.study.law.curves import LossCurve
from llmtrain.study.law.fit import Fit
from llmtrain.study.law.fitted import FittedLaw, covered, doubts_of_tests, errors_on
from llmtrain.study.law.laws import Law
from llmtrain.study.law.trust import Doubt, Range

FORMAT = 1


def report(law: FittedLaw, train: Sequence[LossCurve], test: Sequence[LossCurve] = ()) -> dict[str, Any]:
    """Everything about a law: what it is, and its errors on the fitted curves and on others, if any."""
    marks = doubts_of_tests(law, test)
    found = {
        "format": FORMAT,
        "law": law.primary.law.name,
        "parameters": {**law.primary.parameters, "gamma": laws.GAMMA},
        "intervals": _intervals(law),
        **_errors(law, law.primary, train, test),
        "laws": {fit.law.name: {"parameters": fit.parameters, **_errors(law, fit, train, test)} for fit in law.others},
        "doubts": [doubt._asdict() for doubt in law.doubts],
        "left_out": {"mean": law.left_out_mean, "rms": law.left_out_rms},
        "resolvable": law.resolvable,
        "runs": list(law.runs),
        "range": {
            "peak": law.range.peak,
            "warmup": law.range.warmup,
            "updates": law.range.updates,
            "lowest": law.range.lowest,
            "setting": law.range.setting,
        },
        "resamples": _resamples(law),
    }
    if test:
        found["test"] |= {"covered_by_95_percent": covered(law, test), "doubts": marks}
    return found


def write_law(found: dict[str, Any], path: Path) -> None:
    """Keep a report. Raises EnvironmentError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentError(f"cannot write {path}: {error.strerror}") from None


def read_law(path: Path) -> FittedLaw:
    """The law that a report describes. Raises DataError for a file that is not one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        beside = (p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else ()
        raise DataError(
            f"cannot read law {path}: {error.strerror}{did_you_mean(path.name, beside)}; `llmtrain law fit RUNS --out "
            f"{path}` writes one"
        ) from None
    except ValueError as error:
        raise DataError(
            f"law {path} is not JSON: {error}; write it anew with `llmtrain law fit RUNS --out {path}`"
        ) from None
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise DataError(
            f"law {path} is not of format {FORMAT}; write it anew with `llmtrain law fit RUNS --out {path}`"
        )
    try:
        return _law(kept)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"law {path} is damaged: {error!r}; write it anew with `llmtrain law fit RUNS --out {path}`"
        ) from None


def _law(kept: dict[str, Any]) -> FittedLaw:
    primary = laws.mpl()
    columns = [kept["resamples"][name] for name in (*primary.weights, *primary.exponents)]
    split = len(primary.weights)
    return FittedLaw(
        primary=_fit(primary, kept["parameters"]),
        others=tuple(_fit(_named(name, one["parameters"]), one["parameters"]) for name, one in kept["laws"].items()),
        resamples=tuple(
            Fit(primary, np.array(row[:split]), np.array(row[split:])) for row in zip(*columns, strict=True)
        ),
        range=Range(**kept["range"]),
        runs=tuple(kept["runs"]),
        left_out_mean=kept["left_out"]["mean"],
        left_out_rms=kept["left_out"]["rms"],
        doubts=tuple(Doubt(**doubt) for doubt in kept["doubts"]),
    )


def _named(name: str, parameters: dict[str, float]) -> Law:
    if name == "momentum":
        return laws.momentum(parameters["lambda"])
    return {"time": laws.time_only, "area": laws.area_only}[name]()


def _fit(law: Law, parameters: dict[str, float]) -> Fit:
    known = dict(parameters)
    if "C" in known:
        known["log_C"] = float(np.log(known["C"]))
    weights = np.array([known[name] for name in law.weights])
    return Fit(law, weights, np.array([known[name] for name in law.exponents]), known.get("lambda"))


def _errors(law: FittedLaw, fit: Fit, train: Sequence[LossCurve], test: Sequence[LossCurve]) -> dict[str, Any]:
    return {"train": errors_on(law, fit, train), "test": errors_on(law, fit, test) if test else None}


def _resamples(law: FittedLaw) -> dict[str, list[float]]:
    names = (*law.primary.law.weights, *law.primary.law.exponents)
    rows = np.array([np.concatenate([one.weights, one.exponents]) for one in law.resamples])
    return {name: rows[:, i].tolist() for i, name in enumerate(names)}


def _intervals(law: FittedLaw) -> dict[str, list[float]]:
    """The middle 95 % of the bootstrap, a parameter at a time."""
    every = [one.parameters for one in law.resamples]
    return {name: np.quantile([one[name] for one in every], [0.025, 0.975]).tolist() for name in every[0]}
