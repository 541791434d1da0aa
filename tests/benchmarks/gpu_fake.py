"""What does one rank of many hold and compute under FSDP2? Measured alone, over torch's fake process group.

    python -m tests.benchmarks.gpu_fake --preset llama3-70b --ranks 64

The fake group's collectives return at once and move nothing, so the rank allocates what it would and computes with
numbers that mean nothing: memory is that of a real rank, and time that of its kernels without communication.
"""

import argparse
import json
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.distributed import World
from llmtrain.engines import build_engine
from llmtrain.planner.memory import memory
from llmtrain.train.bench import RandomValues, _random

UPDATES = 3


def described(preset: str, ranks: int, seq_len: int, recompute: str) -> Config:
    """A run of two micro-batches of one sequence on each rank."""
    return validate(
        {
            "run": {"name": "rank"},
            "model": {"preset": preset, "max_seq_len": seq_len},
            "data": {"path": "none", "tokenizer": {"kind": "sentencepiece", "vocab_size": 1024}},
            "batch": {"global_sequences": 2 * ranks, "micro": 1, "seq_len": seq_len},
            "schedule": {"name": "constant", "peak": 1e-4, "horizon": "10 steps"},
            "engine": {"kind": "fsdp", "precision": "bf16", "activation_checkpointing": recompute},
        },
        "gpu_fake",
    )


def main() -> None:
    """Measure one rank and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    config = described(given.preset, given.ranks, 2048 if on_gpu else 64, "all" if "70b" in given.preset else "none")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=given.ranks)
    world = World(0, given.ranks, 0, device)
    engine = build_engine(config, world)
    engine.load(RandomValues(config, device), 0)
    batches, seconds = _random(config, world), []
    for update in range(1 + UPDATES):
        if update == 1 and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        engine.train_step(next(batches), 1.0)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    planned = memory(config, given.ranks, "cuda" if on_gpu else "cpu").total / 2**30
    found = {"preset": given.preset, "ranks": given.ranks, "step_s": round(min(seconds[1:]), 4)}
    if on_gpu:
        found["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    print(json.dumps({**found, "planned_gib": round(planned, 3), "torch": torch.__version__}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
