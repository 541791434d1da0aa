"""How near do the laws come to measured losses, and how long does it take? Prints JSON; `--out FILE` keeps it.

    python -m tests.benchmarks.law [CURVES] --out tests/benchmarks/results/law.json

CURVES is a folder of loss curves `step,lr,loss` with the names of Luo 2025, arXiv:2503.12811 (by default as in
tests/test_law_public.py). Errors are relative, on the curves that were not fitted; times are in seconds, `cpu_s` of
the process.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

from llmtrain.study.law.curves import LossCurve, read_curve
from llmtrain.study.law.fitted import FittedLaw, fit_curves
from llmtrain.study.law.kept import report
from llmtrain.study.law.optimise import optimise
from tests.law_reference import known_curve
from tests.test_law_public import FOLDER, NAMES, WARMUP

SPLITS = (
    ("cosine_24000", "constant_24000", "wsdcon_9"),
    ("cosine_24000", "wsdld_20000_24000"),
    ("cosine_24000", "wsd_20000_24000"),
    ("constant_24000", "wsd_20000_24000"),
    ("constant_24000", "cosine_24000"),
)


def timed_fit(curves: list[LossCurve]) -> tuple[FittedLaw, dict[str, float]]:
    """A law with its intervals, and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    law = fit_curves(curves)
    return law, {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


def split(curves: dict[str, LossCurve], fitted: tuple[str, ...]) -> dict[str, Any]:
    """Fitted on some curves, compared with the others."""
    train = [curves[name] for name in fitted]
    law, taken = timed_fit(train)
    found = report(law, train, [curve for name, curve in curves.items() if name not in fitted])
    errors = {
        name: [round(one["test"][key], 6) for key in ("mean_relative_error", "worst_relative_error")]
        for name, one in {"mpl": found, **found["laws"]}.items()
    }
    return {
        "fitted": list(fitted),
        **taken,
        "mean_and_worst_error": errors,
        "covered_by_95_percent": round(found["test"]["covered_by_95_percent"], 4),
        "resolvable_nats": round(found["resolvable"], 4),
        "parameters": {name: round(value, 4) for name, value in found["parameters"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    law, taken = timed_fit([known_curve(name, 3000, noise=2e-3) for name in ("wsd", "cosine")])
    begin = time.perf_counter()
    optimise(law, 3000, 100, 0.1)
    result: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "command": "python -m tests.benchmarks.law",
        "two runs of a known law": taken,
        "optimise": {"wall_s": round(time.perf_counter() - begin, 2)},
    }
    if all((arguments.curves / f"{name}.csv").is_file() for name in NAMES):
        curves = {name: read_curve(arguments.curves / f"{name}.csv", WARMUP) for name in NAMES}
        result["curves"] = arguments.curves.name
        result["splits"] = [split(curves, fitted) for fitted in SPLITS]
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
