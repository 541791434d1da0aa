"""Which rank ended the job, on which node, and what was every rank doing?

Each rank rewrites its heartbeat in `RUN/ranks/` every few seconds: files outlive a dead first rank, and every node sees
them. When a job ends because of one rank, `RUN/failures/ATTEMPT/` gets what each rank was doing (`rank_00003.txt`, with
its stacks) and one report, `report.json` for scripts and `report.txt` for people. No torch here: a batch script or a
login node reads it.

A rank has `died` (the connection to it broke, and it gives no sign), is `silent` (it gives no sign, but nothing broke:
it is frozen, or its node is), has `failed` (it ended with an error of its own) or is `hung` (it stands apart from ranks
that wait for it). `bad_nodes` are those of ranks that are silent or hung, by the name that Slurm knows: what to leave
out of the next attempt. A process dies of many things, and of a node that died Slurm knows by itself. It is empty where
no rank stands apart.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

RANKS, FAILURES = "ranks", "failures"
REPORT, REPORT_TEXT = "report.json", "report.txt"
_WIDTH = 1024  # bytes of a heartbeat: rewritten in place, so that a beat is one write


@dataclass(frozen=True)
class Heartbeat:
    """What one rank was doing when it last wrote."""

    job: str  # the attempt it belongs to: files of an earlier one may still be there
    rank: int
    host: str
    pid: int
    state: Literal["running", "stopped", "failed"]  # stopped: by its watchdog; failed: by an error of its own
    update: int  # being made, or made last
    phase: str  # preflight, start, update, validate, save, loop (between these), end
    calls: int  # phases entered so far: the same sequence on every rank
    in_phase_s: float
    at: str  # the innermost line of llmtrain: train/loop.py:71 record
    waits: bool  # a thread is inside a collective
    count: int  # beats so far
    exit_code: int = 0
    error: str = ""


class Culprit(NamedTuple):
    """A rank that others waited for."""

    rank: int
    host: str
    kind: Literal["died", "silent", "failed", "hung"]
    told: str  # one sentence


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its heartbeat."""
    return run_dir / RANKS / f"rank_{rank:05d}.json"


def write_heartbeat(run_dir: Path, beat: Heartbeat) -> None:
    """Rewrite a rank's heartbeat in place. Raises OSError."""
    values = asdict(beat)
    values["error"] = beat.error[:300]
    values["at"] = beat.at[:100]
    file = os.open(heartbeat_path(run_dir, beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(values).encode().ljust(_WIDTH))
    finally:
        os.close(file)


def read_heartbeat(run_dir: Path, rank: int, job: str) -> Heartbeat | None:
    """A rank's last heartbeat of this attempt; None where there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        beat = Heartbeat(**json.loads(heartbeat_path(run_dir, rank).read_bytes()))
        return beat if beat.job == job else None
    return None


def judge(
    before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None], hosts: Sequence[str], *, broke: bool
) -> list[Culprit]:
    """Who the others waited for, from the heartbeats of all ranks at two moments that lie several beats apart.

    `broke`: a connection was lost.
    """
    found = []
    kind: Literal["died", "silent"] = "died" if broke else "silent"
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if new is None or (new.state == "running" and old is not None and old.count == new.count):
            last = "it never began" if new is None else f"its last sign was in update {new.update}, {_doing(new)}"
            found.append(Culprit(rank, hosts[rank], kind, f"{kind}: {last}"))
        elif new.state == "failed":
            found.append(
                Culprit(rank, hosts[rank], "failed", f"ended in update {new.update}, {new.phase}: {new.error}")
            )
    if found:
        return found
    beats = [beat for beat in after if beat is not None]
    apart = [] if len(beats) == 1 else _apart(beats)
    return [
        Culprit(
            beat.rank, beat.host, "hung", f"hung in update {beat.update}, {_doing(beat)}, for {beat.in_phase_s:.0f} s"
        )
        for beat in (beats if len(beats) == 1 else apart)
    ]


def _apart(beats: list[Heartbeat]) -> list[Heartbeat]:
    """The ranks that stand apart: outside the collective that others wait in, else behind, else at another line."""
    inside = [beat for beat in beats if beat.waits]
    suspects = [beat for beat in beats if not beat.waits] if inside else beats
    suspects = suspects or beats
    behind = [beat for beat in suspects if beat.calls == min(other.calls for other in suspects)]
    if len(behind) < len(beats):
        return behind
    places = Counter((beat.phase, beat.at) for beat in beats)
    usual, count = places.most_common(1)[0]
    return [beat for beat in beats if (beat.phase, beat.at) != usual] if count > len(beats) / 2 else []


def _doing(beat: Heartbeat) -> str:
    return f"{beat.phase} at {beat.at or 'its start'}{' (in a collective)' if beat.waits else ''}"


def compose(
    attempt: str, reason: str, culprits: Sequence[Culprit], beats: Sequence[Heartbeat | None]
) -> dict[str, Any]:
    """The report of one attempt."""
    bad = {culprit.host for culprit in culprits if culprit.kind in ("silent", "hung")}
    return {
        "attempt": attempt,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "reason": reason,
        "culprits": [culprit._asdict() for culprit in culprits],
        "bad_nodes": sorted(bad),
        "ranks": [None if beat is None else asdict(beat) for beat in beats],
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write both forms; the one for scripts appears whole."""
    (folder / REPORT_TEXT).write_text(told(report))
    draft = folder / f"{REPORT}.tmp"
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(folder / REPORT)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in a failure's folder; None where it is not written (yet)."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / REPORT).read_bytes())
        return found if isinstance(found, dict) else None
    return None


def summary(report: dict[str, Any]) -> str:
    """The culprits, a line each."""
    culprits = report["culprits"]
    if not culprits:
        return f"{report['reason']}; no rank stands apart from the others"
    return "\n".join(f"rank {culprit['rank']} on {culprit['host']}: {culprit['told']}" for culprit in culprits)


def told(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [f"attempt {report['attempt']} was ended: {report['reason']}", summary(report), ""]
    lines.append(f"{'rank':>5}  {'node':<16} {'state':<8} {'update':>8}  {'phase':<9} {'for':>6}  at")
    for rank, beat in enumerate(report["ranks"]):
        if beat is None:
            lines.append(f"{rank:>5}  no sign")
            continue
        where = (
            f"{beat['at']}{' (in a collective)' if beat['waits'] else ''}{'; ' if beat['error'] else ''}{beat['error']}"
        )
        lines.append(
            f"{rank:>5}  {beat['host']:<16} {beat['state']:<8} {beat['update']:>8}  {beat['phase']:<9} "
            f"{beat['in_phase_s']:>5.0f}s  {where}"
        )
    return "\n".join(lines) + "\n"
