"""Which rank am I, and what do all ranks agree on?

`open_world` finds rank and size by itself under `deepspeed`, `torchrun`, `srun` and plain `python`, starts the process
group with gloo for the CPU and NCCL for GPUs, and ends it in order. Everything ranks decide together goes through
`World`, on CPU tensors, so that control messages never queue behind a GPU's work.

Agreements go up a binomial tree and down again: 2 log2 N messages one after another, and 2 a rank in the mean. gloo's
all-reduce is a ring, with 2 (N - 1) after another; what is summed goes through it, for its order of summation is fixed.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from llmtrain.arrival import await_all, launchers_store
from llmtrain.descriptors import raise_limit
from llmtrain.device import choose_gpu, host_threads, require_no_gpus_given, usable_cores
from llmtrain.errors import EnvironmentError
from llmtrain.heap import keep_freed_memory
from llmtrain.rendezvous import meet


class Place(NamedTuple):
    """Where a launcher put this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def find_place(environment: Mapping[str, str]) -> Place:
    """Read rank and world size from what `torchrun`, `deepspeed` or `srun` set; alone where none did.

    Raises EnvironmentError where that contradicts itself: a rank that thinks it is alone would train its own run.
    """
    set_by_launcher = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if set_by_launcher:
        if len(set_by_launcher) == 1:
            raise EnvironmentError(
                f"{set_by_launcher[0]} is set, but RANK and WORLD_SIZE belong together: start with torchrun, "
                f"deepspeed or srun, or `unset {set_by_launcher[0]}`"
            )
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        local_rank = _number(environment, "LOCAL_RANK", rank)
        local_size = _number(environment, "LOCAL_WORLD_SIZE", _number(environment, "LOCAL_SIZE", local_rank + 1))
    elif "SLURM_PROCID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        rank, size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        local_rank = _number(environment, "SLURM_LOCALID", 0)
        local_size = _tasks_on_node(environment, local_rank + 1)
    else:
        return Place(0, 1, 0, 1)
    if not 0 <= rank < size:
        raise EnvironmentError(f"rank {rank} is not below world size {size}: check {names[0]} and {names[1]}")
    if not 0 <= local_rank < local_size:
        raise EnvironmentError(
            f"local rank {local_rank} is not below the node's {local_size} processes: check {names[2]} and {names[3]}"
        )
    return Place(rank, size, local_rank, local_size)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise EnvironmentError(f'{name} is "{text}", which is not a number: the launcher sets it') from None


def _tasks_on_node(environment: Mapping[str, str], default: int) -> int:
    """This node's entry of, for example, `2(x3),1`: two tasks on each of three nodes, one on the fourth."""
    counts: list[int] = []
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(nodes or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else default


@dataclass(frozen=True)
class World:
    """All ranks of this run, seen from this one. Every method is collective."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1  # ranks on this node
    group: dist.ProcessGroup | None = None  # the connections it uses; None: those all share
    timeout_s: int = 1800  # longest wait for another rank

    @property
    def first(self) -> bool:
        """True on the one rank that prints and writes what is written once."""
        return self.rank == 0

    def apart(self, timeout_s: int) -> "World":
        """The same ranks over connections of their own, for a thread whose messages must not mix with this one's."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return replace(self, group=group, timeout_s=timeout_s)

    def own_store(self) -> dist.Store:  # type: ignore[name-defined]
        """The store where the ranks met, over a connection of its own, for another thread. Not collective."""
        return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over all ranks, on the CPU."""
        total = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        found = torch.tensor(values, dtype=torch.int64)
        for child in self._children():
            found = torch.maximum(found, self._received(child, found))
        if not self.first:
            parent = self.rank & (self.rank - 1)
            self._send(parent, found)
            found = self._received(parent, found)
        for child in reversed(self._children()):  # the one with most ranks below it first
            self._send(child, found)
        return [int(value) for value in found]

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return bool(self.largest(int(flag))[0])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)

    def gather_text(self, text: str) -> list[str]:
        """One text from every rank, in rank order."""
        if self.size == 1:
            return [text]
        data = text.encode()
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        width = max(1, *(int(length) for length in lengths))
        everyone = [torch.empty(width, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(everyone, torch.frombuffer(bytearray(data.ljust(width)), dtype=torch.uint8), group=self.group)
        return [bytes(one[: int(n)].tolist()).decode() for one, n in zip(everyone, lengths, strict=True)]

    def _children(self) -> list[int]:
        """The ranks below this one in the tree: its number with one of the zeros at its end set, the nearest first."""
        steps = [1 << bit for bit in range((self.size - 1).bit_length())]
        return [self.rank + step for step in steps if self.rank % (2 * step) == 0 and self.rank + step < self.size]

    def _send(self, to: int, values: torch.Tensor) -> None:
        self._finish(dist.isend(values, to, group=self.group))

    def _received(self, sender: int, like: torch.Tensor) -> torch.Tensor:
        values = torch.empty_like(like)
        self._finish(dist.irecv(values, sender, group=self.group))
        return values

    def _finish(self, message: dist.Work | None) -> None:
        assert message is not None  # only ranks outside of the group get none
        message.wait(timedelta(seconds=self.timeout_s))  # unasked, gloo waits as long as for the connections


def node_name() -> str:
    """This machine, by the name Slurm has for it where it started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def open_world(
    timeout_s: int, *, collectives: bool, meet_timeout_s: int = 60, folder: Path | None = None
) -> Iterator[World]:
    """Join the other ranks for the length of the block. `collectives` starts a process group even for one rank.

    Ranks that `srun` started meet through a file in `folder`. Raises EnvironmentError when the ranks cannot meet within
    `meet_timeout_s`, naming those that did not come.
    """
    place = find_place(os.environ)
    raise_limit()
    device = _device(place)
    if place.size > 1 or collectives:
        _meet(place, device, timeout_s, meet_timeout_s, folder)
    try:
        yield World(place.rank, place.size, place.local_rank, device, place.local_size, timeout_s=timeout_s)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(place: Place) -> torch.device:
    if torch.cuda.is_available():
        index = choose_gpu(torch.cuda.device_count(), place.local_rank, place.local_size, os.environ)
        torch.cuda.set_device(index)
        torch.set_num_threads(host_threads(usable_cores(), place.local_size, os.environ))
        return torch.device("cuda", index)
    require_no_gpus_given(os.environ)
    if "OMP_NUM_THREADS" not in os.environ or place.local_size == 1:
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # "4,2" is for nested teams
        torch.set_num_threads(max(1, int(asked)) if asked.isdigit() else max(1, usable_cores() // place.local_size))
    keep_freed_memory()
    return torch.device("cpu")


def _meet(place: Place, device: torch.device, timeout_s: int, meet_timeout_s: int, folder: Path | None) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=meet_timeout_s)  # of the connections that are made now
    try:
        if place.size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
            return
        with _store(place, timeout_s, meet_timeout_s, folder) as store:
            await_all(store, place.rank, place.size, node_name(), meet_timeout_s)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        set_timeouts(timeout_s)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR unset)')}:{os.environ.get('MASTER_PORT', '(unset)')}"
        me = f"rank {place.rank} of {place.size} on {node_name()}"
        raise EnvironmentError(f"{me} could not meet the others at {address}: {error}") from error


def _store(
    place: Place, timeout_s: int, meet_timeout_s: int, folder: Path | None
) -> AbstractContextManager[dist.Store]:  # type: ignore[name-defined]
    """Where the ranks meet, for the length of a block."""
    if "RANK" not in os.environ and folder is not None:
        return meet(place.rank, place.size, folder, timeout_s)
    return nullcontext(launchers_store(place.rank, place.size, meet_timeout_s))


def set_timeouts(timeout_s: int) -> None:
    """Give every group that there is this longest wait: torch gives groups that engines make one of its own."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
