"""What do messages between the ranks cost an update? Prints one JSON object; `--out FILE` keeps it.

    python -m tests.benchmarks.control --out tests/benchmarks/results/control.json

So many light ranks, forked processes with no model, meet as those of training do and exchange messages over sockets on
loopback. `before` is what every update did until now: two all-reduces of a number over gloo, a ring. `agreement` is
`World.largest`, up a tree and down again. `after` is `StopRequest.agreed` as the loop calls it, after each of UPDATES
updates of UPDATE_S, in which nothing is computed: most send nothing, and one in POLL_S / UPDATE_S agrees.

`wall_s` is the time a rank spends there, `cpu_s` the CPU time that its process takes for it, `messages` how many it
sends, counted where they are sent: means over ranks. `hops` is how many messages follow one another. A ring and a tree
send as many in all; in the ring each waits for the one before. All ranks share this machine's cores, so here wall times
grow with the work of all ranks together. On a rank's own core `cpu_s` is its part of an update. Linux.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist

import llmtrain
from llmtrain.distributed import World, open_world
from llmtrain.train.stop import POLL_S, StopRequest
from tests.ranks import free_ports

SIZES = (8, 16, 32, 64, 128, 256)
ROUNDS = 30
UPDATES, UPDATE_S = 200, 0.05
WARM_UP = 3


def spent(action: Callable[[int], None], count: int, world: World) -> dict[str, float]:
    """Seconds of one of so many actions on this rank, once all have warmed up."""
    for index in range(WARM_UP):
        action(index)
    world.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    for index in range(count):
        action(index)
    return {"wall_s": (time.perf_counter() - began) / count, "cpu_s": (time.process_time() - cpu) / count}


def ring(_: int) -> None:
    """The messages of an update as they were: valid tokens of all ranks, and whether one of them must stop."""
    for number in (4096, 0):
        dist.all_reduce(torch.tensor(number))


def polled(world: World, folder: Path) -> dict[str, float]:
    """What `StopRequest.agreed` takes of an update, and how many messages this rank sends."""
    sent, send = 0, World._send

    def counted(self: World, *arguments: Any) -> None:
        nonlocal sent
        sent += 1
        send(self, *arguments)

    stop = StopRequest(folder, None)
    for _ in range(WARM_UP):  # the first two agree, and learn how long an update takes
        time.sleep(UPDATE_S)
        stop.agreed(world)
    world.barrier()
    World._send = counted  # type: ignore[method-assign]
    wall = cpu = 0.0
    began = time.perf_counter()
    for k in range(1, UPDATES + 1):
        time.sleep(max(0.0, began + k * UPDATE_S - time.perf_counter()))  # as if the engine kept the ranks together
        before, cpu_before = time.perf_counter(), time.process_time()
        stop.agreed(world)
        wall += time.perf_counter() - before
        cpu += time.process_time() - cpu_before
    World._send = send  # type: ignore[method-assign]
    return {"wall_s": wall / UPDATES, "cpu_s": cpu / UPDATES, "messages": sent / UPDATES}


def rank(folder: Path) -> None:
    """One rank's measurements, into a file."""
    torch.set_num_threads(1)
    with open_world(300, collectives=True, meet_timeout_s=300) as world:
        found = {
            "before": spent(ring, ROUNDS, world),
            "agreement": spent(lambda _: world.barrier(), ROUNDS, world),
            "after": polled(world, folder),
        }
        (folder / f"{world.rank}.json").write_text(json.dumps(found))
        world.barrier()


def measured(size: int) -> dict[str, Any]:
    """The mean over `size` ranks."""
    with tempfile.TemporaryDirectory(prefix="llmtrain-control-") as name:
        folder, [port] = Path(name), free_ports(1)
        environment = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = []
        for index in range(size):
            child = os.fork()
            if child == 0:
                _enter(folder, {**environment, "RANK": index, "LOCAL_RANK": index, "OMP_NUM_THREADS": 1})
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            raise RuntimeError(f"of {size} ranks {sum(map(bool, codes))} failed")
        found = [json.loads((folder / f"{index}.json").read_text()) for index in range(size)]
    means = {
        part: {key: float(f"{mean(one[part][key] for one in found):.3g}") for key in found[0][part]}
        for part in found[0]
    }
    depth = (size - 1).bit_length()
    means["before"] |= {"messages": 4 * (size - 1) / size, "hops": 4 * (size - 1)}
    means["agreement"] |= {"messages": 2 * (size - 1) / size, "hops": 2 * depth}
    return means


def _enter(folder: Path, environment: dict[str, Any]) -> None:
    """Be one rank, and end: what the parent would do at its end must not happen here too."""
    code = 1
    try:
        os.environ.update({key: str(value) for key, value in environment.items()})
        rank(folder)
        code = 0
    except BaseException as error:
        print(f"rank {environment['RANK']}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    asked = parser.parse_args()
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    by_size = {}
    for size in asked.sizes:
        by_size[size] = measured(size)
        print(size, json.dumps(by_size[size]), file=sys.stderr, flush=True)
    result = {
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "llmtrain": llmtrain.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": "python -m tests.benchmarks.control",
        "update_s": UPDATE_S,
        "poll_s": POLL_S,
        "ranks": by_size,
        **({"growth_8_to_128": _growth(by_size[8], by_size[128])} if {8, 128} <= by_size.keys() else {}),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


def _growth(few: dict[str, Any], many: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times as much it is with many ranks."""
    return {part: {key: round(many[part][key] / few[part][key], 2) for key in few[part]} for part in few}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
