"""Does every rank get on? A job in which one does not is ended, with a report that names it.

A thread of each rank writes its heartbeat and looks at three things: how long this rank has been in one phase, whether
the next rank still lives, and whether some rank has begun to report a failure. Where something is wrong it writes this
rank's stacks, one rank writes the report (`llmtrain.train.failures`), and the process ends hard with exit code 4: a
thread in a collective of gloo or NCCL cannot be called back. A peer that dies without a word is found at once where the
connection breaks, else by its silence: in the store (`llmtrain.train.pulse`) and in its file, so that neither a slow
file system nor a slow network ends a job.

How long anything may take, `llmtrain.train.limits` says. Time counts as this thread saw it pass: a job that was
suspended is not ended for it.
"""

import contextlib
import faulthandler
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from llmtrain.config import Config
from llmtrain.distributed import World, node_name
from llmtrain.errors import LlmtrainError, RankError
from llmtrain.train.failures import (
    FAILURES,
    Heartbeat,
    compose,
    heartbeat_path,
    judge,
    read_heartbeat,
    read_report,
    summary,
    told,
    write_heartbeat,
    write_report,
)
from llmtrain.train.limits import Limits
from llmtrain.train.metrics import MetricsLog
from llmtrain.train.pulse import Pulse
from llmtrain.train.stacks import doing, flight_recorder, native_stacks, raised_at

BEATS_PER_S = 100  # of all ranks together: a shared file system bears so many writes
GRACE_S = 2.0  # at least, for other ranks to write what they do, or to end by themselves
LEAVE_S = 60.0  # in which a rank that failed must be gone: destroying a process group can hang


class Call(NamedTuple):
    """What the main thread is at."""

    phase: str
    number: int
    since: float  # by the watchdog's own clock


class Watchdog:
    """Watches one rank for the length of a `with` block. `update` is the update being made, or made last."""

    def __init__(self, config: Config, world: World) -> None:
        """Collective: all ranks learn which attempt this is."""
        self.run_dir = Path(config.run.dir)
        self.rank, self.size = world.rank, world.size
        self.limits = Limits.of(config, world.size)
        shared = world.gather_text(f"{node_name()}\n{attempt_name(self.run_dir) if world.first else ''}")
        self.hosts = [text.split("\n")[0] for text in shared]
        self.attempt, self.job = shared[0].split("\n")[1:]
        self.folder = self.run_dir / FAILURES / self.attempt
        self.tick_s = min(1.0, self.limits.usual / 20, self.limits.death / 20)
        self.beat_s = max(self.tick_s, self.size / BEATS_PER_S)
        self.pulse = Pulse(world.own_store(), self.job, self.rank, self.size, self.tick_s) if self.size > 1 else None
        self.update = 0
        self.clock = 0.0
        self.call = Call("preflight", 0, 0.0)
        self._known = {"loop"}
        self._beats = 0
        self._beat_at = 0.0  # when files are written and read again
        self._next: Heartbeat | None = None  # of the next rank, when it was last read
        self._sign: tuple[tuple[int, int], float] = ((-1, -1), 0.0)  # its last in the store and its file; since when
        self._answer: tuple[int, float] = (0, 0.0)  # the last of the store, and since when
        self._reported = False  # some rank has begun to report
        self._called_at: float | None = None  # when trouble elsewhere was first seen
        self._leave_by: float | None = None
        self._exit_code = RankError.exit_code
        self._left = False  # this rank wrote how it ended
        self._writing = threading.Lock()
        self._ending = threading.Lock()
        self._over = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        heartbeat_path(self.run_dir, self.rank).parent.mkdir(parents=True, exist_ok=True)
        self._beat("running")
        if self.pulse is not None:
            self.pulse.__enter__()
        self._thread.start()
        return self

    @property
    def grace_s(self) -> float:
        """How long a rank is waited for that is to give a sign. srun and torchrun end all 30 s after the first."""
        heard = self.pulse is not None and self.clock - self._answer[1] < 5 * self.pulse.every_s
        return max(GRACE_S, 2.5 * (self.pulse.every_s if heard and self.pulse else self.beat_s))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Raises RankError where the error is that another rank was lost."""
        if error is None or self.size == 1:
            self._stop()
            self._forget(self.rank)
            return
        self._leave_by = self.clock + LEAVE_S + self.grace_s
        if lost_peer(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that saw it too: the report comes first
            raise RankError(self._end("the connection to another rank was lost", error)) from None
        self._exit_code = error.exit_code if isinstance(error, LlmtrainError) else 1
        self._beat("failed", error)
        if self._exit_code == LlmtrainError.exit_code and self._all_refuse():
            self._forget(*range(self.size))

    def _all_refuse(self) -> bool:
        """Whether every rank ended with a mistake of the user, so that none is left to report a failure.

        Asked by each that did, so the last one finds it: it takes the heartbeats of all with it.
        """
        others = ((self.rank + ahead) % self.size for ahead in range(1, self.size))
        beats = (read_heartbeat(self.run_dir, rank, self.job) for rank in others)
        return all(
            beat is not None and beat.state == "failed" and beat.exit_code == LlmtrainError.exit_code for beat in beats
        )

    def _forget(self, *ranks: int) -> None:
        """Remove heartbeats, and with the last of them their folder."""
        with contextlib.suppress(OSError):
            for rank in ranks:
                heartbeat_path(self.run_dir, rank).unlink(missing_ok=True)
            heartbeat_path(self.run_dir, self.rank).parent.rmdir()

    def at(self, phase: str) -> None:
        """The main thread begins another phase."""
        self._known.add(self.call.phase)
        self.call = Call(phase, self.call.number + 1, self.clock)

    def follow(self, watched: object, phases: Mapping[str, str]) -> None:
        """From now on, the methods of this object that `phases` names are these phases; between them it is `loop`."""
        for name, phase in phases.items():
            setattr(watched, name, self._told(phase, getattr(watched, name)))

    def _told(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if phase == "update":
                self.update += 1
            self.at(phase)
            result = method(*arguments, **named)  # where it raises, the phase is the one it raised in
            self.at("loop")
            return result

        return call

    def _stop(self) -> None:
        self._over.set()
        self._thread.join()
        if self.pulse is not None:
            self.pulse.__exit__()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.tick_s):
            now = time.monotonic()
            self.clock += min(now - before, 3 * self.tick_s)
            before = now
            if self.pulse is not None and self.pulse.answers != self._answer[0]:
                self._answer = (self.pulse.answers, self.clock)
            if self.size > 1:  # ends this process where this thread cannot: one that holds the GIL, a dead file system
                faulthandler.dump_traceback_later(self._limit()[0] + 3 * self.grace_s, exit=True, file=2)
            if self._leave_by is not None:
                if self.clock > self._leave_by:
                    os._exit(self._exit_code)
                continue
            if self.clock >= self._beat_at:
                self._beat_at = self.clock + self.beat_s - self.tick_s / 2
                self._beat("running")
                self._next = read_heartbeat(self.run_dir, (self.rank + 1) % self.size, self.job)
                self._reported = self.folder.is_dir()
            reason = self._trouble()
            if reason:
                self._end(reason)
                os._exit(self._exit_code)

    def _limit(self) -> tuple[float, str]:
        return self.limits.of_phase(self.call.phase, self.call.phase in self._known)

    def _trouble(self) -> str:
        """Why the job must end now; empty where it need not."""
        call = self.call
        limit, field = self._limit()
        if self.clock - call.since > limit:
            return f"no progress for {limit:g} s ({field}) in update {self.update}, {call.phase}"
        if self.size == 1:
            return ""
        called = self._reported or (self.pulse is not None and self.pulse.called)
        why = "another rank ended it" if called else self._neighbours_trouble()
        if not why:
            self._called_at = None
            return ""
        if self._called_at is None:
            self._called_at = self.clock
        return why if self.clock - self._called_at > self.grace_s else ""

    def _neighbours_trouble(self) -> str:
        """What is wrong with the next rank: it failed and this one waits for it, or it is silent."""
        beat, rank = self._next, (self.rank + 1) % self.size
        if beat is None:
            return ""
        if beat.state == "failed" and doing(self._main)[1]:
            self._exit_code = beat.exit_code if beat.exit_code > 1 else RankError.exit_code
            return f"rank {rank} failed"
        sign = (self.pulse.count if self.pulse else -1, beat.count)
        if sign != self._sign[0]:
            self._sign = (sign, self.clock)
        silence, field = self.limits.of_silence(beat.phase, 2 * self.grace_s + 4 * self.tick_s)
        if self.clock - self._answer[1] > silence / 2:  # signs come as seldom as files are written
            silence = max(silence, 3 * self.beat_s)
        silent = beat.state == "running" and self.clock - self._sign[1] > silence
        return f"rank {rank} gave no sign for {silence:g} s ({field})" if silent else ""

    def _end(self, reason: str, error: BaseException | None = None) -> str:
        """Write what this rank does, and the report where no other rank does. Returns the report's summary."""
        if not self._ending.acquire(blocking=False):  # the other thread is at it, and ends the process
            time.sleep(LEAVE_S)
            return reason
        reports = self._claim()
        if reports and self.pulse is not None:
            self.pulse.call()
        before, counts = self._signs() if reports else ([], None)
        self._beat("stopped", error)
        with contextlib.suppress(OSError):
            self._dump(reason, error)
        deadline = time.monotonic() + self.grace_s * (1 if reports else 3)
        report = None
        while report is None and time.monotonic() < deadline:
            time.sleep(0.05)
            report = read_report(self.folder)
        if reports:
            after, counts_after = self._signs()
            if counts is not None and counts_after is not None:
                before, after = _counted(before, counts), _counted(after, counts_after)
            report = compose(self.attempt, reason, judge(before, after, self.hosts, broke=error is not None), after)
            with contextlib.suppress(OSError):
                write_report(self.folder, report)
            print(f"{told(report)}stacks: {self.folder}", file=sys.stderr, flush=True)
        return f"{summary(report) if report else reason}\nThe stacks of all ranks are in {self.folder}"

    def _signs(self) -> tuple[list[Heartbeat | None], list[int] | None]:
        """The heartbeats of all ranks, and their numbers in the store where it tells them."""
        counts = self.pulse.everyone(GRACE_S / 2) if self.pulse is not None else None
        return [read_heartbeat(self.run_dir, rank, self.job) for rank in range(self.size)], counts

    def _claim(self) -> bool:
        """Whether this rank is the one to write the report: the one that makes the folder, which calls the others."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except OSError:
            return False
        return True

    def _beat(self, state: Literal["running", "stopped", "failed"], error: BaseException | None = None) -> None:
        """Write what this rank does now. How it ended is its last word, whichever thread wrote it."""
        call = self.call
        at, waits = doing(self._main)
        if error is not None:  # the main thread is no longer where it was
            at, waits = raised_at(error), lost_peer(error)
        with self._writing, contextlib.suppress(OSError):
            if self._left and state == "running":
                return
            self._left = state != "running"
            self._beats += 1
            beat = Heartbeat(
                job=self.job,
                rank=self.rank,
                host=self.hosts[self.rank],
                pid=os.getpid(),
                state=state,
                update=self.update,
                phase=call.phase,
                calls=call.number,
                in_phase_s=round(self.clock - call.since, 1),
                at=at,
                waits=waits,
                count=self._beats,
                exit_code=self._exit_code if state == "failed" else 0,
                error="" if error is None else f"{type(error).__name__}: {error}",
            )
            write_heartbeat(self.run_dir, beat)

    def _dump(self, reason: str, error: BaseException | None) -> None:
        """This rank's stacks, and the last collectives where torch recorded them."""
        path = self.folder / f"rank_{self.rank:05d}.txt"
        with path.open("w") as file:
            file.write(f"rank {self.rank} on {self.hosts[self.rank]}, process {os.getpid()}: {reason}\n\n")
            if error is not None:
                file.write("".join(traceback.format_exception(type(error), error, error.__traceback__)) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write(native_stacks())
        if recorded := flight_recorder():
            path.with_suffix(".collectives.json").write_text(recorded)


def _counted(beats: Sequence[Heartbeat | None], counts: Sequence[int]) -> list[Heartbeat | None]:
    """Heartbeats whose number grows with each sign, in the file or in the store."""
    pairs = zip(beats, counts, strict=True)
    return [None if beat is None else replace(beat, count=beat.count + count) for beat, count in pairs]


def leave_failures_to_watchdog() -> None:
    """Keep NCCL from ending this process before the report is written. To be called before its groups are made.

    On a broken connection torch's handler of NCCL errors aborts the process at once, and its monitor does after 8
    minutes in which its own thread was kept, less than `engine.timeout_s`. Without them a rank waits in its collective
    until the watchdog ends it. What a user has set stays. Only training has a watchdog: other commands keep both.
    """
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        os.environ.setdefault(name, "0")


def group_timeout_s(config: Config) -> int:
    """The longest wait in a collective: longer than the watchdog's, which tells more."""
    return max(config.engine.timeout_s, config.engine.start_timeout_s) + int(LEAVE_S)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that the connection to another rank broke, or that a wait for it was too long."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def attempt_name(run_dir: Path) -> str:
    """The name of this attempt's failure, and a token of its own."""
    number, again = str(MetricsLog(run_dir).next_attempt()), 1
    name = number
    while (run_dir / FAILURES / name).exists():  # an attempt that left no row has no number of its own
        again += 1
        name = f"{number}.{again}"
    return f"{name}\n{secrets.token_hex(8)}"
