"""How long does a save hold training up, and does memory grow with saves?

    python -m tests.benchmarks.saving --gib 1 --out tests/benchmarks/results/saving.json

Saves one state in turns with and without a thread, to the same folder, and prints the median time that `save` took.
Then resident memory is read before any save and after 30.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llmtrain
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.distributed import World
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT, FlatState, Slice

SLICES = 100


def state_of(gib: float) -> FlatState:
    """A state of so many GiB, in slices as a model has them."""
    count = int(gib * 2**30 / 4 / 3 / SLICES)
    slices = [
        Slice(f"{index}.weight", 0, count, count, {kind: torch.rand(count) for kind in (WEIGHT, EXP_AVG, EXP_AVG_SQ)})
        for index in range(SLICES)
    ]
    return FlatState(slices, 0)


def blocked(saver: Saver, state: FlatState, update: int) -> float:
    """Seconds that training waits for a save; then wait for the save itself."""
    begun = time.perf_counter()
    saver.save(state._replace(update=update), {"step": update}, {}, lambda: "", ephemeral=False)
    took = time.perf_counter() - begun
    assert saver.finish() is None
    return took


def measure(gib: float, folder: Path, rounds: int) -> dict[str, Any]:
    """Blocked seconds of both ways, and resident memory."""
    state = state_of(gib)
    savers = {
        name: Saver(CheckpointStore(folder, World(0, 1, 0, torch.device("cpu")), 2), state, str, background=background)
        for name, background in (("async", True), ("sync", False))
    }
    before = resident_mib()
    seconds: dict[str, list[float]] = {"async": [], "sync": []}
    for update in range(1, 2 * rounds + 1):
        name = ("sync", "async")[update % 2]
        seconds[name].append(blocked(savers[name], state, update))
    for update in range(2 * rounds + 1, 31):
        blocked(savers["async"], state, update)
    after = resident_mib()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "gib": gib,
        "rounds": rounds,
        "blocked_s": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "blocked_s_median": {name: round(value, 4) for name, value in medians.items()},
        "async_of_sync": round(medians["async"] / medians["sync"], 4),
        "resident_mib_before": round(before, 1),
        "resident_mib_after_30": round(after, 1),
        "growth": round(after / before - 1, 4),
    }


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="where to save; a temporary folder")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="saving_", dir=asked.dir))
    try:
        result = {
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": {
                "llmtrain": llmtrain.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            **measure(asked.gib, folder, asked.rounds),
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
