"""How fast are initial values drawn? Prints one JSON object; `--out FILE` keeps it.

    python -m tests.benchmarks.drawing --threads 1 2 --out tests/benchmarks/results/drawing.json

Numbers a second into memory of the host that was touched before, by so many threads, in the order of the model's
parameters (`--millions` of them, of `llama-7b`); `fill` beside it writes a constant into the same memory by as many
threads of torch, which is what memory allows. Rounds take turns; the best of each is kept, since another process on the
machine only slows. Numbers a second of CPU time say what a core of its own would draw where the machine is shared.
`llama_7b_s` is how long all its parameters take at the rate that was reached.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.config import ModelConfig
from llmtrain.model.initial import draw_initial, parameter_shapes
from tests.benchmarks.memory import cpu_name


def rates(config: ModelConfig, names: list[str], out: torch.Tensor, threads: int) -> tuple[float, float]:
    """Numbers a second, and a second of CPU time, over these parameters, each drawn into the front of `out`."""
    shapes = parameter_shapes(config)
    began, busy, count = time.perf_counter(), time.process_time(), 0
    for name in names:
        numel = math.prod(shapes[name])
        draw_initial(out[:numel].numpy(), config, name, 0, 1234, threads)
        count += numel
    return count / (time.perf_counter() - began), count / (time.process_time() - busy)


def filled(out: torch.Tensor, threads: int) -> float:
    """Numbers a second that memory takes."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    out.fill_(1.0)
    return out.numel() / (time.perf_counter() - began)


def measure(config: ModelConfig, numbers: int, threads: list[int], rounds: int) -> dict[str, Any]:
    """The best rate of each number of threads, over parameters that hold `numbers` together or more."""
    shapes = parameter_shapes(config)
    names: list[str] = []
    for name in (name for name in shapes if name.startswith("blocks.")):
        if sum(math.prod(shapes[one]) for one in names) >= numbers:
            break
        names.append(name)
    out = torch.zeros(max(math.prod(shapes[name]) for name in names)).fill_(0.0)
    drawn: dict[int, list[tuple[float, float]]] = {count: [] for count in threads}
    memory: dict[int, list[float]] = {count: [] for count in threads}
    for _ in range(rounds):
        for count in threads:
            drawn[count].append(rates(config, names, out, count))
            memory[count].append(filled(out, count))
    whole = sum(map(math.prod, shapes.values()))
    return {
        str(count): {
            "millions_a_second": round(max(drawn[count])[0] / 1e6, 1),
            "millions_a_cpu_second": round(max(busy for _, busy in drawn[count]) / 1e6, 1),
            "fill_millions_a_second": round(max(memory[count]) / 1e6, 1),
            "llama_7b_s": round(whole / max(drawn[count])[0], 1),
        }
        for count in threads
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--millions", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        "versions": {"numpy": np.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "command": f"python -m tests.benchmarks.drawing --threads {' '.join(map(str, asked.threads))} "
        f"--millions {asked.millions} --rounds {asked.rounds}",
        "threads": measure(ModelConfig(preset="llama-7b"), asked.millions * 10**6, asked.threads, asked.rounds),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
