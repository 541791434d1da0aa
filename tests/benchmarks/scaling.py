"""Does the cost grow as it should? Prints one JSON object; `--out FILE` keeps it, `--png FILE` plots it.

    python -m tests.benchmarks.scaling --out tests/benchmarks/results/scaling.json --png scaling.png

One bench for each of: sequence 128 to 4096, layers 2 to 16, accumulation 1 to 64, ranks 1 to 4 (one thread each), the
rest held. Then one process makes many updates of a micro model, and its resident memory is compared with that after the
first tenth. Tokens per second are those of the median update.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.ranks import free_ports

ROOT = Path(__file__).parent.parent.parent
BASE: dict[str, Any] = {
    "run": {"name": "scaling"},
    "model": {
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_size": 344,
        "vocab_size": 512,
        "max_seq_len": 4096,
    },
    "data": {"path": "none", "tokenizer": {"kind": "sentencepiece", "vocab_size": 512}},
    "batch": {"global_sequences": 8, "micro": 8, "seq_len": 128},
    "schedule": {"name": "constant", "peak": 1e-3, "horizon": "1000000 steps"},
    "engine": {"kind": "single", "precision": "fp32"},
}


def bench(ranks: int, steps: int, **changes: Any) -> dict[str, Any]:
    """The JSON of `llmtrain bench` with `section__key=value` changed."""
    values = yaml.safe_load(yaml.safe_dump(BASE))
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "llmtrain", "bench", "--config", str(path), "--steps", str(steps), "--json"]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        [port] = free_ports(1)
        common |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        started = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(ranks)
        ]
        text = started[0].communicate()[0]
        for process in started:
            process.wait()
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def growth(steps: int) -> dict[str, dict[int, dict[str, float]]]:
    """Tokens per second and memory by what is varied."""
    kept = ("tokens_per_s", "memory_gib", "planned_gib", "step_s")
    runs: dict[str, list[tuple[int, int, dict[str, Any]]]] = {
        "seq_len": [
            (T, 1, {"batch__seq_len": T, "batch__micro": 4096 // T, "batch__global_sequences": 4096 // T})
            for T in (128, 512, 2048, 4096)
        ],
        "layers": [(L, 1, {"model__num_layers": L}) for L in (2, 4, 8, 16)],
        "accumulation": [(n, 1, {"batch__micro": 2, "batch__global_sequences": 2 * n}) for n in (1, 4, 16, 64)],
        "ranks": [
            (n, n, {"engine__kind": "fsdp", "batch__micro": 2, "batch__global_sequences": 24}) for n in (1, 2, 3, 4)
        ],
    }
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, some in runs.items():
        for at, ranks, changes in some:
            result = bench(ranks, steps, **changes)
            found.setdefault(name, {})[at] = {key: result[key] for key in kept}
    return found


def memory_growth(updates: int) -> dict[str, float]:
    """Resident MiB of a process after a tenth of its updates and after all of them."""
    import torch

    from llmtrain.config_file import validate
    from llmtrain.distributed import open_world
    from llmtrain.engines import build_engine
    from llmtrain.train.start import InitialValues
    from tests.test_fast import SMALL, batches

    config = validate(SMALL, "scaling")
    early = 0.0
    with open_world(60, collectives=False) as world:
        torch.set_num_threads(1)  # opening the world has taken every core
        engine = build_engine(config, world)
        engine.load(InitialValues(config), 0)
        for k, micro_batches in zip(range(1, updates + 1), batches(), strict=False):
            engine.train_step(micro_batches, 0.1)
            if k == updates // 10:
                early = resident_mib()
    return {"updates": updates, "after_a_tenth_mib": early, "at_the_end_mib": resident_mib()}


def resident_mib() -> float:
    """Memory of this process now, in MiB. Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def plot(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Tokens per second over each thing varied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3))
    for axes, (name, rows) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axes.loglog(list(rows), [row["tokens_per_s"] for row in rows.values()], marker="o")
        axes.set_xlabel(name)
        axes.set_ylabel("tokens/s")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--png", type=Path)
    given = parser.parse_args()
    found = growth(given.steps)
    result = {"command": "python -m tests.benchmarks.scaling", **found, "memory": memory_growth(given.updates)}
    text = json.dumps(result, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    if given.png is not None:
        plot(found, given.png)


if __name__ == "__main__":
    main()
