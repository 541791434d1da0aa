"""How fast are the links between ranks, and how long does an update use them?"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.distributed import World


def communication_s(world: World, update: Callable[[], object]) -> dict[str, float]:
    """Seconds of an update in which this rank's collectives run, by what they do; empty for one rank.

    They run inside the phases, beside computation where they overlap, and begin when the first rank calls them.
    """
    if world.size == 1:
        return {}
    with torch.profiler.profile() as profiler:
        update()
    seconds = {"reduce": 0.0, "gather": 0.0}
    for event in profiler.key_averages():
        name = event.key.lower().replace("_", "")
        if name.startswith("gloo:") or name.startswith("nccldevkernel"):
            spent = event.device_time_total if world.device.type == "cuda" else event.cpu_time_total
            kind = "reduce" if "reduce" in name else "gather" if "allgather" in name else None
            if kind is not None:
                seconds[kind] += spent / 1e6
    return {kind: round(spent, 6) for kind, spent in seconds.items()}


def collectives(world: World) -> dict[str, float]:
    """GB/s of each collective by what a rank sends and receives on a ring of all ranks; empty for one rank."""
    if world.size == 1:
        return {}
    numel = (2**26 if world.device.type == "cuda" else 2**20) // 4 // world.size * world.size
    whole, part = torch.zeros(numel, device=world.device), torch.zeros(numel // world.size, device=world.device)
    share = (world.size - 1) / world.size * 4 * numel / 1e9
    actions: dict[str, tuple[Callable[[], Any], float]] = {
        "all_reduce_gb_per_s": (lambda: dist.all_reduce(whole), 2 * share),
        "all_gather_gb_per_s": (lambda: dist.all_gather_into_tensor(whole, part), share),
        "reduce_scatter_gb_per_s": (lambda: dist.reduce_scatter_tensor(part, whole), share),
    }
    return {name: round(sent / _fastest(action, world), 3) for name, (action, sent) in actions.items()}


def _fastest(action: Callable[[], Any], world: World) -> float:
    taken = []
    for _ in range(4):
        world.barrier()
        begin = time.perf_counter()
        action()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        taken.append(time.perf_counter() - begin)
    return min(taken)
