"""Does another job train this run already?

`RUN/lock` names who does: host, process, job. Its holder writes it anew every few seconds, so a lock that does not
change has lost its holder, whatever the clocks of two nodes say. A process that is gone from this host, and an earlier
attempt of the same Slurm job, are known to be gone at once.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.distributed import World
from llmtrain.errors import CheckpointError

BEAT_S = 3.0
SILENT_S = 4 * BEAT_S  # a lock that did not change for so long has no holder


class RunLock:
    """The lock of one run folder, held by its first rank."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self.token = secrets.token_hex(8)
        self.problem = ""  # set where the lock was lost: another job took it for dead
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock. Raises CheckpointError where its holder lives, OSError where the folder is not writable."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._remove_dead()
        self._thread.start()

    def release(self) -> None:
        """Give the lock back, if it is still this job's."""
        self._ended.set()
        self._thread.join()
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Write the lock where there is none."""
        try:
            with self.path.open("x") as file:
                file.write(self._text(0))
        except FileExistsError:
            return False
        return True

    def _remove_dead(self) -> None:
        """Remove the lock of a holder that is gone. Raises CheckpointError where it is not."""
        holder = _read(self.path)
        if not _known_dead(holder):
            deadline = time.monotonic() + SILENT_S
            while time.monotonic() < deadline:
                if not self.path.exists():
                    return
                if _read(self.path) != holder:
                    raise CheckpointError(_told(self.path, holder))
                time.sleep(BEAT_S / 10)
        aside = self.path.with_name(f"lock.{self.token}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            theirs = _read(aside)
            if theirs.get("token") != holder.get("token"):  # another starter was faster: it is theirs
                aside.rename(self.path)
                raise CheckpointError(_told(self.path, theirs))
            aside.unlink()

    def _beat(self) -> None:
        count, draft = 0, self.path.with_name(f"lock.{self.token}")
        while not self._ended.wait(BEAT_S):
            count += 1
            with contextlib.suppress(OSError):
                found = _read(self.path)
                if found and found.get("token") != self.token:
                    self.problem = f"{_told(self.path, found)} (it took this one for dead)"
                    return
                draft.write_text(self._text(count))
                draft.replace(self.path)

    def _text(self, beat: int) -> str:
        return json.dumps({**_me(), "token": self.token, "beat": beat})


@contextmanager
def hold_run(run_dir: Path, world: World) -> Iterator[RunLock]:
    """Hold a run's lock for the length of the block. Collective: every rank raises where it is taken."""
    lock = RunLock(run_dir)
    problem = ""
    if world.first:
        try:
            lock.acquire()
        except (CheckpointError, OSError) as error:
            problem = str(error)
    problem = next((text for text in world.gather_text(problem) if text), "")
    if problem:
        raise CheckpointError(problem)
    try:
        yield lock
    finally:
        if world.first:
            lock.release()


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pids": _pid_namespace(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _known_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder can be told to be gone without waiting."""
    me = _me()
    if holder.get("job") is not None and holder["job"] == me["job"] and holder.get("restarts") != me["restarts"]:
        return True
    if (holder.get("host"), holder.get("pids")) != (me["host"], me["pids"]):
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return holder.get("started") != _started(holder["pid"])  # the number went to another process


def _pid_namespace() -> str:
    """In what scope a process number has a meaning: containers on one host have one each."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where it ended or that is not told."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _told(path: Path, holder: dict[str, Any]) -> str:
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return (
        f"{path.parent} is being trained by process {holder.get('pid')} on {holder.get('host')}{job}: stop that one, "
        "or use another run.dir"
    )
