"""Where do the ranks that `srun` started meet?

At a store that the first rank opens on a port the system gives it, so that no two jobs ask for the same one. It tells
the others name and port in `RUN/rendezvous.<job>.<step>.<restart>.json`, a file they wait for: the run folder is what
all of them see. MASTER_ADDR, MASTER_PORT or both, where they are set, are used as they are.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from llmtrain.errors import EnvironmentError

FILE_S = 600.0  # for the first rank to come: many nodes that load Python at once take long
CONNECT_S = 30.0
POLL_S = 0.1


@contextmanager
def meet(rank: int, size: int, folder: Path, timeout_s: int) -> Iterator[Store]:
    """The store all ranks of this step share. The file is removed when the block is left.

    Raises EnvironmentError where MASTER_PORT is taken, the file does not come, or the first rank cannot be reached.
    """
    path = folder / f"rendezvous.{_step(os.environ)}.json"
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:
        store = _open(size, timeout)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"addresses": _own_names(os.environ), "port": store.port}))
        draft.replace(path)
    else:
        store = _join(path, rank, size, timeout)
    try:
        yield store
    finally:
        if rank == 0:
            path.unlink(missing_ok=True)


def _step(environment: Mapping[str, str]) -> str:
    """What tells this start of this step of this job from every other."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(environment.get(name) or "0" for name in names)


def _own_names(environment: Mapping[str, str]) -> list[str]:
    """What other nodes may know this one by, the likeliest first."""
    if environment.get("MASTER_ADDR"):
        return [environment["MASTER_ADDR"]]
    return list(dict.fromkeys([environment.get("SLURMD_NODENAME") or socket.gethostname(), socket.gethostname()]))


def _open(size: int, timeout: timedelta) -> TCPStore:
    given = os.environ.get("MASTER_PORT") or "0"
    if not given.isdigit():
        raise EnvironmentError(f'MASTER_PORT is "{given}", which is not a number: unset it, and a free port is taken')
    try:
        return TCPStore("localhost", int(given), size, is_master=True, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentError(
            f"rank 0 on {socket.gethostname()} cannot listen on MASTER_PORT {given}, it may be taken: unset "
            f"MASTER_PORT, and a free one is found ({str(error).splitlines()[0]})"
        ) from None


def _join(path: Path, rank: int, size: int, timeout: timedelta) -> TCPStore:
    me = f"rank {rank} on {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"
    addresses, port = _await(path, me)
    deadline = time.monotonic() + CONNECT_S
    while True:
        problems = []
        for address in addresses:
            try:
                socket.create_connection((address, port), timeout=5).close()
                return TCPStore(address, port, size, timeout=timeout, wait_for_workers=False)
            except (OSError, RuntimeError) as error:
                problems.append(f"{address}:{port} ({getattr(error, 'strerror', None) or error})")
        if time.monotonic() > deadline:
            raise EnvironmentError(
                f"{me} cannot reach rank 0 at {' or '.join(problems)}: check the network between the nodes, or name an "
                "address of the first node that the others reach with MASTER_ADDR"
            )
        time.sleep(POLL_S)


def _await(path: Path, me: str) -> tuple[list[str], int]:
    """Addresses and port, once rank 0 has written them."""
    deadline = time.monotonic() + FILE_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(path.read_text())
            return found["addresses"], found["port"]
        if time.monotonic() > deadline:
            raise EnvironmentError(
                f"{me} waited {FILE_S:.0f} s for {path}, which rank 0 writes: see why rank 0 did not start, or whether "
                "run.dir is on a disk that every node sees"
            )
        time.sleep(POLL_S)
