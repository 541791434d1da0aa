"""Is a Slurm job that ended worth another start? The run's own record decides, `attempts.jsonl`.

Not where the run is finished or a person asked for its end; not after a mistake, which the next start would make again;
not where the job never came to train, where starts lead nowhere, or where their number is used up.

A node that went bad is left out of the next start where the job's partition can spare it: a job that excludes a node it
needs would wait for ever. The batch script says on stdin, two words a line, what Slurm knows: `needs 2`, the nodes that
the job needs; `n0 mix`, a node of the partition and its state, as `sinfo --format="%N %t"` says it; `n0 required`, a
node the job was submitted with; `n9 excluded`, one it does without.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llmtrain.train.attempts import read_attempts
from llmtrain.train.failures import FAILURES, read_report

FRUITLESS = 3  # starts in a row from the same update: what ends them will end the next one
MISTAKES = (2, 3)  # exit codes of the door: a mistake of the user, a loss that is not finite
USABLE = ("idle", "alloc", "mix", "comp", "plnd")  # states in which a node takes jobs, now or when its own are over
SUFFIXES = "+-~#!%@^"  # of a usable one: it sleeps, reboots, is planned for a job; not * (silent), $ (maintenance)


class Verdict(NamedTuple):
    """Whether to start again, why, and on which nodes not to."""

    again: bool
    why: str
    without: list[str] = []


def decide(
    run_dir: Path,
    job: str,
    restart: int,
    code: int,
    attempts: int,
    slurm_says: Callable[[], str] = lambda: sys.stdin.read(),
) -> Verdict:
    """What to do after start number `restart` (from 0) of a job, whose tasks ended with exit code `code`.

    `slurm_says` is asked only where a node went bad, for the lines described above.
    """
    mine = [row for row in read_attempts(run_dir) if row["job"] == job]
    ended = [row for row in mine if row["event"] == "ended" and row["restart"] == restart]
    started = [row for row in mine if row["event"] == "started"]
    outcomes = {row["outcome"]: row for row in ended}
    if "finished" in outcomes:
        return Verdict(False, "the run is finished")
    if code in MISTAKES or any(row.get("exit_code") in MISTAKES for row in ended):
        return Verdict(False, "a mistake, which another start would make again: see the message above")
    if "stopped" in outcomes and outcomes["stopped"]["reason"].startswith("the file "):
        return Verdict(False, f"it was asked to stop: {outcomes['stopped']['reason']}")
    if not started:
        return Verdict(False, "it ended before its first update: see the messages above")
    if restart + 1 >= attempts:
        return Verdict(False, f"all {attempts} attempts are used up")
    begun = [row["update"] for row in started[-FRUITLESS:]]
    if "stopped" not in outcomes and len(begun) == FRUITLESS and len(set(begun)) == 1:
        return Verdict(False, f"{FRUITLESS} starts in a row ended before they saved anything after update {begun[0]}")
    if "stopped" in outcomes:
        return Verdict(True, f"stopped by {outcomes['stopped']['reason']}")
    why = f"ended with exit code {code}"
    bad = _bad_nodes(run_dir, started[-1]["attempt"])
    if not bad:
        return Verdict(True, why)
    without, kept = leave_out(bad, slurm_says())
    return Verdict(True, "; ".join([why, *kept]), without)


def leave_out(bad: list[str], slurm_says: str) -> tuple[list[str], list[str]]:
    """Which nodes to exclude from the next start, and of each bad one that is not, why.

    They are those left out before and the bad ones that can be spared, none where no bad one can.
    """
    said = [(words[0], words[1]) for line in slurm_says.splitlines() if len(words := line.split()) == 2]
    needed = next((word for name, word in said if name == "needs"), "")
    if not needed.isdigit():
        why = f'the batch script does not say how many nodes the job needs: fewest="{needed}"'
        return [], [f"{node} is not left out: {why}" for node in bad]
    usable = {name for name, state in said if state.rstrip(SUFFIXES) in USABLE}
    without = {name for name, word in said if word == "excluded"}
    spared, kept = [], []
    for node in bad:
        left = len(usable - without - {node})
        if (node, "required") in said:
            kept.append(f"{node} is not left out: the job asks for it by name")
        elif left < int(needed):
            kept.append(f"{node} is not left out: the partition has no spare node ({needed} needed, {left} besides it)")
        else:
            spared.append(node)
            without.add(node)
    return sorted(without) if spared else [], kept


def _bad_nodes(run_dir: Path, attempt: int) -> list[str]:
    """What the last report of this attempt says of its nodes; nothing where it left none."""
    folders = sorted((run_dir / FAILURES).glob(f"{attempt}*"), key=lambda path: path.stat().st_mtime)
    report = read_report(folders[-1]) if folders else None
    return [] if report is None else sorted(report["bad_nodes"])
