"""Start real ranks for tests: new processes with the variables `torchrun` sets, from a server that has torch loaded.

Importing torch and DeepSpeed takes seconds, so a fork server does it once. Each leg is still a process of its own,
which knows nothing of the one before.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Ranks:
    """The processes of one leg."""

    def __init__(self, processes: list[BaseProcess], output: Path) -> None:
        self.processes = processes
        self.output = output

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes, once every rank has ended. Fails the test, with the output, on a timeout."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            for process in self.processes:
                process.kill()
            raise AssertionError(f"ranks still running after {timeout} s:\n{self.text()}")
        return [process.exitcode if process.exitcode is not None else -1 for process in self.processes]

    def kill(self) -> None:
        """Kill every rank at once (`grouped` ones), and those that had not joined their group yet."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[0].pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()

    def text(self) -> str:
        """What the ranks printed, one after another."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.output.glob("rank_*.log")))

    def succeeded(self) -> "Ranks":
        """Wait, and fail the test with what was printed unless every rank ended well."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.text()}"
        return self


def start(output: Path, count: int, function: Callable[..., Any], *arguments: Any, grouped: bool = False) -> Ranks:
    """Run `function(*arguments)` on `count` ranks; what they print goes to files in `output`.

    Ranks that are `grouped` form a process group of their own, named for the first, which one signal reaches.
    """
    output.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    processes = []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        }
        leader = None if not grouped else processes[0].pid if processes else 0
        arguments_of_rank = (output / f"rank_{rank}.log", environment, leader, function, arguments)
        process = _CONTEXT.Process(target=_enter, args=arguments_of_rank)
        process.start()
        processes.append(process)
    return Ranks(processes, output)


def _enter(
    log: Path,
    environment: dict[str, str],
    leader: int | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    while leader is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the leader may not have made the group yet
            os.setpgid(0, leader)
            break
        time.sleep(0.001)
    os.environ.update(environment)
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import torch

        torch.set_num_threads(1)
        code = 0
        try:
            function(*arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        # Gloo sometimes aborts while the interpreter ends, after all work is done; what was written is what counts.
        with contextlib.suppress(ValueError):
            import sys

            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and below those that Linux gives to connections, which could take them at once."""
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)
