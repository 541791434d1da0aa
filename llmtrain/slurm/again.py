"""Is a Slurm job that ended worth another start? The run's own record decides, `attempts.jsonl`.

Not where the run is finished or a person asked for its end; not after a mistake, which the next start would make again;
not where the job never came to train, where starts lead nowhere, or where their number is used up.
"""

from pathlib import Path
from typing import NamedTuple

from llmtrain.train.attempts import read_attempts
from llmtrain.train.failures import FAILURES, read_report

FRUITLESS = 3  # starts in a row from the same update: what ends them will end the next one
MISTAKES = (2, 3)  # exit codes of the door: a mistake of the user, a loss that is not finite


class Verdict(NamedTuple):
    """Whether to start again, why, and on which nodes not to."""

    again: bool
    why: str
    without: list[str] = []


def decide(run_dir: Path, job: str, restart: int, code: int, attempts: int) -> Verdict:
    """What to do after start number `restart` (from 0) of a job, whose tasks ended with exit code `code`."""
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
    why = f"stopped by {outcomes['stopped']['reason']}" if "stopped" in outcomes else f"ended with exit code {code}"
    return Verdict(True, why, [] if "stopped" in outcomes else _bad_nodes(run_dir, started[-1]["attempt"]))


def _bad_nodes(run_dir: Path, attempt: int) -> list[str]:
    """What the last report of this attempt says of its nodes; nothing where it left none."""
    folders = sorted((run_dir / FAILURES).glob(f"{attempt}*"), key=lambda path: path.stat().st_mtime)
    report = read_report(folders[-1]) if folders else None
    return [] if report is None else sorted(report["bad_nodes"])
