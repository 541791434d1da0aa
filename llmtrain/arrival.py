"""Has every rank come?

Each rank writes its name into the store that all of them share. The first rank waits for all names, a bounded time,
and tells the others what it found, so that a node that is not there is named by every rank, at once, and before a
collective waits for it.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from llmtrain.errors import EnvironmentError

POLL_S = 0.05
VERDICT_S = 30  # longer than the first rank waits, for its verdict
TOLD_S = 10


def launchers_store(rank: int, size: int, within_s: int) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT: of `torchrun`'s agent where it has one, else opened by rank 0.

    Raises EnvironmentError where these are not set, RuntimeError where it cannot be opened or reached.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise EnvironmentError(
            f'MASTER_ADDR is "{address or ""}" and MASTER_PORT "{port}": torchrun and deepspeed set them; with another '
            "launcher export the first node's name and a free port"
        )
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=within_s)
    store = TCPStore(address, int(port), size, opens, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def await_all(store: Store, rank: int, size: int, name: str, within_s: int) -> None:
    """Return once all ranks have called this. `name` is this rank's node.

    Raises EnvironmentError on every rank that came, naming those that did not come in `within_s` seconds.
    """
    store.set(f"arrived/{rank}", name)
    if rank == 0:
        store.set("verdict", "-" + _missing(store, size, within_s))
    try:
        store.wait(["verdict"], timedelta(seconds=within_s + VERDICT_S))
        verdict = store.get("verdict").decode()[1:]
    except RuntimeError:
        verdict = f"rank 0 did not answer rank {rank} on {name} within {within_s + VERDICT_S} s: see why it ended"
    if verdict:
        _leave(store, rank, size)
        raise EnvironmentError(verdict)


def _leave(store: Store, rank: int, size: int) -> None:
    """The store ends with the first rank, so that one waits until the others that came have read the verdict."""
    with contextlib.suppress(RuntimeError):
        store.set(f"told/{rank}", "")
        if rank == 0:
            came = [other for other in range(size) if store.check([f"arrived/{other}"])]
            store.wait([f"told/{other}" for other in came], timedelta(seconds=TOLD_S))


def _missing(store: Store, size: int, within_s: int) -> str:
    """Who did not come, for the user; empty where all did."""
    deadline = time.monotonic() + within_s
    left = list(range(size))
    while left:
        left = [] if store.check([f"arrived/{rank}" for rank in left]) else _absent(store, left)
        if left and time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if not left:
        return ""
    nodes = expected_nodes(os.environ)
    who = ", ".join(f"rank {rank}{f' on {nodes[rank]}' if rank < len(nodes) else ''}" for rank in left)
    return (
        f"{who} did not come within {within_s} s (engine.meet_timeout_s), the other {size - len(left)} of {size} ranks "
        "did: see in its log whether it ended before, and whether its node is up and reaches rank 0's"
    )


def _absent(store: Store, ranks: list[int]) -> list[int]:
    return [rank for rank in ranks if not store.check([f"arrived/{rank}"])]


def expected_nodes(environment: Mapping[str, str]) -> list[str]:
    """The node of each rank of a Slurm step, by the rank; empty elsewhere."""
    if "RANK" in environment:
        return []
    names = list(expand(environment.get("SLURM_STEP_NODELIST", "")))
    counts: list[int] = []
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(nodes or 1)
    return [name for name, count in zip(names, counts, strict=False) for _ in range(count)]


def expand(nodes: str) -> Iterator[str]:
    """The names in a list as Slurm writes it: `a[01-03,7],b2` is a01, a02, a03, a7, b2."""
    for name, inside, after in re.findall(r"([^\[\],]+)(?:\[([^\]]*)\])?([^\[\],]*)", nodes):
        if not inside:
            yield name + after
            continue
        for part in inside.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield f"{name}{number:0{len(first)}d}{after}"
