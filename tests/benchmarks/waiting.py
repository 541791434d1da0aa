"""How long does a user wait for what should be immediate? Prints one JSON object; `--out FILE` keeps it.

    python -m tests.benchmarks.waiting --out tests/benchmarks/results/waiting.json

Each number is the median of several repetitions, in seconds. A launch is the demo's own command on each engine and
under each launcher, from its start until the row of update 1 stands in metrics.jsonl: pre-flight, initial weights, the
validation before the first update and the update itself are in it. `cpu` are the CPU seconds of all its processes to
their end, which say more where the machine is shared; launches take turns, `--repeat` times. `--launches` measures
these alone and leaves the rest of FILE as it is. Before it: `llmtrain prepare --config configs/demo_cosine.yaml`.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config import ScheduleConfig
from llmtrain.data.order import Order
from llmtrain.schedules import catalog, plan

ROOT = Path(__file__).parent.parent.parent
MILLION = np.arange(1, 1_000_001)
NEEDED: dict[str, dict[str, Any]] = {
    "exponential": {"floor": 0.1},
    "piecewise": {"knots": [["0%", 1.0], ["100%", 0.0]]},
    "refined": {"norms": [1.0, 2.0, 3.0, 4.0]},
    "chain": {"pieces": [{"name": "linear", "length": "100%"}]},
}
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": ["torchrun", "--nproc-per-node", "2"],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
}
LAUNCHES: dict[str, tuple[str, ...]] = {  # the launcher, and what is overridden
    "single, python": ("python", "engine.kind=single"),
    "FSDP2, 2 ranks, torchrun": ("torchrun", "engine.kind=fsdp"),
    **{
        f"ZeRO-{stage}, {ranks}, {launcher}": (launcher, "engine.kind=deepspeed", f"engine.zero_stage={stage}")
        for stage in (0, 1, 2, 3)
        for launcher, ranks in (("deepspeed", "2 ranks"), ("torchrun", "2 ranks"), ("python", "1 rank"))
    },
}


def median_s(action: Callable[[], Any], repetitions: int = 5) -> float:
    """Median wall time of `action`."""
    taken = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return round(statistics.median(taken), 4)


def command_s(*words: str, repetitions: int = 5) -> float:
    """Median wall time of an `llmtrain` command."""
    code = "import sys; from llmtrain.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *words]
    return median_s(lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL), repetitions)


def first_update_s(launcher: str, *overrides: str) -> tuple[float, float]:
    """Seconds from the start of the demo's launcher to its first update's row; CPU seconds of all its processes."""
    before = _cpu_s()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["launch/pretrain.py", "--config", "configs/demo_cosine.yaml"]
        for override in (f"run.dir={run}", "run.stop_at=1 steps", *overrides):
            words += ["--set", override]
        begin = time.perf_counter()
        with (Path(folder) / "log").open("w") as log:
            launched = subprocess.Popen([*LAUNCHERS[launcher], *words], cwd=ROOT, stdout=log, stderr=log)
        try:
            while not any('"kind": "step"' in line for line in _rows(run)):
                if launched.poll() not in (None, 0):
                    raise RuntimeError((Path(folder) / "log").read_text())
                time.sleep(0.02)
            waited = time.perf_counter() - begin
        finally:
            launched.wait()
    return waited, _cpu_s() - before


def _cpu_s() -> float:
    """CPU seconds of all processes below this one that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def launches_s(repeat: int) -> dict[str, dict[str, float]]:
    """Every launch in turn, `repeat` times: medians of `first_update_s`."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in LAUNCHES}
    for _ in range(repeat):
        for name, words in LAUNCHES.items():
            taken[name].append(first_update_s(*words))
    return {
        name: {"s": round(statistics.median(wall), 2), "cpu": round(statistics.median(cpu), 2)}
        for name, (wall, cpu) in ((name, zip(*pairs, strict=True)) for name, pairs in taken.items())
    }


def _rows(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def million_updates_s() -> dict[str, float]:
    """Vectorised evaluation of a million updates of every registered schedule."""
    taken = {}
    for shape in catalog():
        keys = {"warmup": "0 steps", "horizon": "1000000 steps", **NEEDED.get(shape.name, {})}
        schedule = plan(ScheduleConfig.model_validate({"name": shape.name, "peak": 1.0, **keys}), 1)
        taken[shape.name] = median_s(lambda schedule=schedule: schedule.multipliers(MILLION), 3)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    result = json.loads(asked.out.read_text()) if asked.launches and asked.out and asked.out.exists() else commands_s()
    result["launch to first update"] = launches_s(asked.repeat)
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


def commands_s() -> dict[str, Any]:
    """What there is to wait for beside a launch, and where it was measured."""
    return {
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "command": "python -m tests.benchmarks.waiting",
        "llmtrain --help": command_s("--help"),
        "schedule show --config configs/7b_cosine.yaml": command_s(
            "schedule", "show", "--config", "configs/7b_cosine.yaml"
        ),
        "import llmtrain": median_s(
            lambda: subprocess.run([sys.executable, "-c", "import llmtrain"], cwd=ROOT, check=True)
        ),
        "python -c pass": median_s(lambda: subprocess.run([sys.executable, "-c", "pass"], cwd=ROOT, check=True)),
        "import llmtrain.schedules": median_s(
            lambda: subprocess.run([sys.executable, "-c", "import llmtrain.schedules"], cwd=ROOT, check=True)
        ),
        "4096 samples at position 10**12": median_s(lambda: Order(10**9 + 7, 1, "abc").samples(10**12, 4096)),
        "a million updates": million_updates_s(),
    }


if __name__ == "__main__":
    main()
