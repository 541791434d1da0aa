"""Is every rank what the others take it for, before the first update?

`require_alike` compares what must be the same everywhere (the package's code, the resolved config, the data, the
versions) and names at once every rank and item that differs from what most ranks have. `notices` are what may be
meant, and costs hours where it is not: clocks apart, a full disk, a GPU in use, different GPUs. `measure` times an
all-reduce of all ranks, and a message from each rank to the next: the all-reduce is as slow as its slowest link, and
only the single links tell which that is. That the ranks arrive at all is `open_world`'s to see.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, median_low
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import llmtrain
from llmtrain.config import Config, content_hash
from llmtrain.data.batches import ValidationSet
from llmtrain.data.dataset import PreparedData
from llmtrain.distributed import World, node_name
from llmtrain.errors import EnvironmentError

CLOCKS_APART_S = 5.0
LEAST_FREE_GIB = 1.0
LEAST_FREE_GPU = 0.9  # of its memory, before the model is on it
SLOW = 4.0  # times the usual time of a link
SLOW_AT_LEAST_S = 0.02
ROUNDS = 3
PARTS_SHOWN = 3

Parts = dict[str, str]


class Link(NamedTuple):
    """A message of one rank to the next."""

    sender: int
    receiver: int
    seconds: float
    crosses_nodes: bool


def require_alike(config: Config, data: PreparedData, held_out: Sequence[ValidationSet], world: World) -> list[str]:
    """Raise EnvironmentError on every rank, with all that differs, where the ranks are not alike. Returns notices."""
    if world.size == 1:
        return notices([_state(config, world)])
    items = own_items(config, data, held_out)
    digests = {item: content_hash(parts) for item, parts in items.items()}
    world.barrier()
    told = [json.loads(text) for text in world.gather_text(json.dumps({**_state(config, world), "items": digests}))]
    differing = [item for item in digests if len({one["items"].get(item) for one in told}) > 1]
    if differing:
        texts = world.gather_text(json.dumps({item: items[item] for item in differing}))
        lines = differences([json.loads(text) for text in texts], [one["node"] for one in told])
        raise EnvironmentError(
            "the ranks are not alike, nothing was trained:\n"
            + "".join(f"  {line}\n" for line in lines)
            + "start every rank from the same checkout, environment, config and data folder"
        )
    return notices(told)


def own_items(config: Config, data: PreparedData, held_out: Sequence[ValidationSet]) -> dict[str, Parts]:
    """What must be the same on every rank: by item, its parts."""
    sets = {f"validation set {one.name}": one.hash for one in held_out}
    return {
        "code": dict(_code()),
        "config": dict(_flat("", config.model_dump(mode="json"))),
        "data": {"tokens": data.manifest.content_hash, "tokenizer": data.manifest.tokenizer_hash, **sets},
        "versions": {
            "llmtrain": llmtrain.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA": str(torch.version.cuda),
            **{name: _version(name) for name in ("deepspeed", "numpy")},
        },
    }


def differences(everyone: Sequence[dict[str, Parts]], nodes: Sequence[str]) -> list[str]:
    """A line for each group of ranks and each item in which it differs from what most ranks have."""
    lines: dict[str, list[int]] = {}
    for item in everyone[0]:
        usual, count = Counter(content_hash(one[item]) for one in everyone).most_common(1)[0]
        if count <= len(everyone) / 2:
            usual = content_hash(everyone[0][item])
        like = next(rank for rank, one in enumerate(everyone) if content_hash(one[item]) == usual)
        for rank, one in enumerate(everyone):
            if content_hash(one[item]) != usual:
                how = _how(item, one[item], everyone[like][item], f"rank {like} on {nodes[like]}")
                lines.setdefault(f"on {nodes[rank]}: {how}", []).append(rank)
    return [f"{_ranks(ranks)} {line}" for line, ranks in lines.items()]


def notices(told: Sequence[dict[str, Any]]) -> list[str]:
    """What may be meant, a line each, from what every rank told of its node."""
    lines = []
    usual_clock = median_low(one["clock"] for one in told)
    usual_gpu = Counter(one["gpu"] for one in told).most_common(1)[0][0]
    for rank, one in enumerate(told):
        who = f"rank {rank} on {one['node']}"
        if abs(one["clock"] - usual_clock) > CLOCKS_APART_S:
            lines.append(f"the clock of {who} is {one['clock'] - usual_clock:+.0f} s from the others'")
        for folder, free in one["free_gib"].items():
            if free < LEAST_FREE_GIB:
                lines.append(f"{folder} of {who} has {free:.2f} GiB free")
        if one["gpu_free"] < LEAST_FREE_GPU:
            lines.append(f"the GPU of {who} is in use: {one['gpu_free']:.0%} of its memory is free")
        if one["gpu"] != usual_gpu:
            lines.append(f"the GPU of {who} is a {one['gpu']}, the others' are {usual_gpu}")
    return lines


def measure(world: World) -> list[str]:
    """Lines that tell how fast the ranks reach each other, and which link is slow. Collective."""
    if world.size == 1:
        return []
    size_bytes = 2**26 if world.device.type == "cuda" else 2**20
    buffer = torch.zeros(size_bytes // 4, device=world.device)
    together = min(_all_reduce_s(buffer, world) for _ in range(ROUNDS))
    received = min(_message_s(buffer, world) for _ in range(ROUNDS))
    told = [json.loads(text) for text in world.gather_text(json.dumps([node_name(), together, received]))]
    nodes = [node for node, _, _ in told]
    slowest = max(seconds for _, seconds, _ in told)
    links = [
        Link((rank - 1) % world.size, rank, seconds, nodes[rank - 1] != nodes[rank])
        for rank, (_, _, seconds) in enumerate(told)
    ]
    rate = 2 * (world.size - 1) / world.size * size_bytes / slowest / 1e9
    count = len(set(nodes))
    return [
        f"{world.size} ranks on {count} node{'s' * (count > 1)} are alike; an all-reduce of {size_bytes >> 20} MiB "
        f"takes {1e3 * slowest:.1f} ms ({rate:.2f} GB/s)",
        *slow_links(links, nodes, size_bytes),
    ]


def slow_links(links: Sequence[Link], nodes: Sequence[str], size_bytes: int) -> list[str]:
    """A line for every link that takes several times as long as is usual for its kind: in a node, or between two."""
    found = []
    for link in links:
        usual = median([other.seconds for other in links if other.crosses_nodes == link.crosses_nodes])
        if len(links) == 2:
            usual = min(other.seconds for other in links)
        if link.seconds > SLOW * usual and link.seconds > usual + SLOW_AT_LEAST_S:
            found.append((link, usual))
    ends = Counter(rank for link, _ in found for rank in (link.sender, link.receiver))
    shared = [rank for rank, count in ends.items() if count > 1 and len(links) > 2]
    lines = [
        f"SLOW: rank {link.sender} on {nodes[link.sender]} to rank {link.receiver} on {nodes[link.receiver]}: "
        f"{size_bytes / link.seconds / 1e9:.3f} GB/s, where {size_bytes / usual / 1e9:.3f} is usual"
        for link, usual in found
    ]
    return [*lines, *(f"SLOW: rank {rank} on {nodes[rank]} is at the end of both" for rank in sorted(shared))]


def _all_reduce_s(buffer: torch.Tensor, world: World) -> float:
    world.barrier()
    began = time.perf_counter()
    dist.all_reduce(buffer)
    _finish(world)
    return time.perf_counter() - began


def _message_s(buffer: torch.Tensor, world: World) -> float:
    """How long the message of the rank before takes to arrive, while this rank sends one to the next."""
    arriving = torch.empty_like(buffer)
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    world.barrier()
    began = time.perf_counter()
    operations = [dist.P2POp(dist.irecv, arriving, before), dist.P2POp(dist.isend, buffer, after)]
    arrived, *sent = dist.batch_isend_irecv(operations)
    arrived.wait()
    _finish(world)
    seconds = time.perf_counter() - began
    for work in sent:
        work.wait()
    return seconds


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _state(config: Config, world: World) -> dict[str, Any]:
    """What one rank tells of its node."""
    folders = {_existing(Path(config.run.dir)), Path(tempfile.gettempdir())}
    gpu, gpu_free = "", 1.0
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        gpu, gpu_free = torch.cuda.get_device_name(world.device), free / total
    return {
        "node": node_name(),
        "clock": time.time(),
        "free_gib": {str(folder): shutil.disk_usage(folder).free / 2**30 for folder in sorted(folders)},
        "gpu": gpu,
        "gpu_free": gpu_free,
    }


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _code() -> Iterator[tuple[str, str]]:
    """Every file of the package, with its hash."""
    package = Path(llmtrain.__file__).parent
    for path in sorted(package.rglob("*.py")):
        yield f"llmtrain/{path.relative_to(package)}", hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """A config's fields by dotted name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    else:
        yield name, json.dumps(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _how(item: str, mine: Parts, theirs: Parts, whose: str) -> str:
    """Where one rank's parts of an item differ from those of another."""
    names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    shown = [f"{name} is {mine.get(name, 'missing')}, on {whose} {theirs.get(name, 'missing')}" for name in names]
    more = f", and {len(names) - PARTS_SHOWN} more" if len(names) > PARTS_SHOWN else ""
    return f"{item}: " + "; ".join(shown[:PARTS_SHOWN]) + more


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
