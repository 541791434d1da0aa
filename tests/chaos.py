"""Does a run that is killed hundreds of times come out as the run that never was?

    python -m tests.chaos --kills 200 --out tests/benchmarks/results/chaos.json

Two FSDP2 ranks train a small model with saves in the background, ephemeral and permanent ones. Again and again SIGKILL
hits all of them at once: half of the times a random few milliseconds after a save began, else at a random moment after
a random number of further updates, or while the ranks start. Each restart must go on from the newest checkpoint that
was published, and the run must end with the bytes of the one that was never killed.
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import llmtrain
from llmtrain.checkpoint.places import step_of
from llmtrain.cli import main as llmtrain_main
from tests import ranks
from tests.conftest import small_config, text_folder

INTERVAL, PERMANENT = 3, 9  # updates between saves, and between those that are not ephemeral
MOST_UPDATES = 5  # that a leg makes beyond the one before, if it is not killed while it saves or starts
CLOCK = ("step_time_s", "tokens_per_s", "mfu", "memory_gib", "attempt")  # what no two runs have alike
HARMLESS = re.compile(r'step_\d+\.tmp: this save was cut short|latest: it names "step_\d+", which (is older|does not)')


class Kill(NamedTuple):
    """One leg of the run, up to its end."""

    aimed: str  # save, update, start
    resumed: int | None  # update it went on from; 0: from the start; None: killed before it said so
    rejected: list[str]  # what it said of checkpoints it passed over
    reached: int  # last update on record
    tmp_there: bool  # an unfinished checkpoint newer than any published one, of this leg or one before
    published: int  # the newest checkpoint that was there; 0: none


def chaos(
    config: dict[str, Any], folder: Path, *, kills: int, updates: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Kill a run so many times in `folder`, and compare what becomes of it with the run never killed.

    Raises AssertionError where a leg went on from anything but the newest published checkpoint, or fails by itself.
    """
    moments = random.Random(seed)
    straight, run = folder / "straight", folder / "run"
    _to_its_end(_leg(config, folder, straight, updates))
    say(f"{updates} updates straight through")
    done: list[Kill] = []
    while len(done) < kills:
        before = done[-1] if done else Kill("update", 0, [], 0, False, 0)
        aimed = "save" if len(done) % 2 else "start" if moments.random() < 0.2 else "update"
        running = _leg(config, folder, run, updates)
        _wait_for_moment(running, run, aimed, before, moments)
        running.kill()
        codes = running.wait()
        if codes != [-signal.SIGKILL] * 2:
            assert codes == [0, 0] and _last_update(run) == updates, f"{codes}\n{running.text()}"
            break
        done.append(_found(run, aimed, running.text()))
        _check(before, done[-1])
        say(f"kill {len(done)}: {done[-1]}")
    said = _to_its_end(_leg(config, folder, run, updates))
    resumed, rejected = _told(said)
    assert resumed in (done[-1].published, updates), said
    assert not list((run / "checkpoints").glob("*.broken"))
    return _summary(done, rejected, same_files(straight, run, updates), updates)


def same_files(a: Path, b: Path, updates: int) -> dict[str, bool]:
    """Whether two runs left the same weights, and the same rows but for the clock's."""
    weights = [sorted((run / f"checkpoints/step_{updates:08d}").glob("rank_*.safetensors")) for run in (a, b)]
    one, other = ([path.read_bytes() for path in paths] for paths in weights)
    return {"weights": len(one) == 2 and one == other, "metrics": _rows(a) == _rows(b)}


def _leg(config: dict[str, Any], folder: Path, run: Path, updates: int) -> ranks.Ranks:
    """Start the same command again."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    words = ["train", "--config", str(path)]
    for override in (
        f"run.dir={run}",
        "engine.kind=fsdp",
        f"schedule.horizon={updates} steps",
        f"checkpoint.every={PERMANENT} steps",
        f"checkpoint.ephemeral={INTERVAL} steps",
        "checkpoint.keep=2",
    ):
        words += ["--set", override]
    logs = folder / "logs"
    number = len(list(logs.iterdir())) if logs.exists() else 0
    return ranks.start(logs / f"{number:04d}", 2, llmtrain_main, words, grouped=True)


def _to_its_end(running: ranks.Ranks) -> str:
    """Wait for a leg that nothing kills. Returns what it printed."""
    codes = running.wait(3600)
    assert codes == [0, 0], f"{codes}\n{running.text()}"
    return running.text()


def _wait_for_moment(running: ranks.Ranks, run: Path, aimed: str, before: Kill, moments: random.Random) -> None:
    """Return when the leg is to be killed, or has ended."""
    if aimed == "start":
        time.sleep(moments.uniform(0, 1.5))
        return
    target = before.reached + moments.randint(1, MOST_UPDATES)
    unfinished = _unfinished(run)
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in running.processes):
        assert time.monotonic() < deadline, running.text()
        if aimed == "save":
            if any(step > before.published for step, _ in _unfinished(run) - unfinished):
                break
        elif _last_update(run) >= target:
            break
        time.sleep(0.0005)
    time.sleep(moments.uniform(0, 0.02))


def _found(run: Path, aimed: str, said: str) -> Kill:
    """What a killed leg left behind."""
    resumed, rejected = _told(said)
    names = [path.name for path in (run / "checkpoints").iterdir()] if (run / "checkpoints").exists() else []
    published = max((step_of(name) for name in names if "." not in name), default=-1)
    tmp_there = any(step > published for step, _ in _unfinished(run))
    return Kill(aimed, resumed, rejected, _last_update(run), tmp_there, max(0, published))


def _check(before: Kill, after: Kill) -> None:
    """Each leg goes on from the newest published checkpoint, and passes over nothing that was published."""
    assert after.resumed in (None, before.published), (before, after)
    for text in after.rejected:
        assert HARMLESS.match(text), (text, before, after)
    # The save before the one under way is published once that one begins.
    assert after.reached - after.published <= 2 * INTERVAL, after


def _told(said: str) -> tuple[int | None, list[str]]:
    """From which update a leg went on, and what it rejected."""
    found = re.search(r"RESUMED run=\S+ step=(\d+)", said)
    resumed = int(found[1]) if found else 0 if "FRESH START" in said else None
    return resumed, re.findall(r"^rejected (.*)", said, re.MULTILINE)


def _unfinished(run: Path) -> set[tuple[int, int]]:
    """The checkpoints being written, as (update, inode)."""
    found = set()
    for path in (run / "checkpoints").glob("step_*.tmp"):
        try:
            found.add((step_of(path.name), path.stat().st_ino))
        except FileNotFoundError:
            continue
    return found


def _last_update(run: Path) -> int:
    """The last whole row's update."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    return int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else 0


def _rows(run: Path) -> list[str]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in row.items() if key not in CLOCK}) for row in rows]


def _summary(done: list[Kill], last_rejected: list[str], same: dict[str, bool], updates: int) -> dict[str, Any]:
    lost = [kill.reached - kill.published for kill in done]
    rejected = [text for kill in done for text in kill.rejected] + last_rejected
    kinds = Counter(re.sub(r"\d+", "N", text) for text in rejected)
    return {
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "llmtrain": llmtrain.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": "python -m tests.chaos " + " ".join(sys.argv[1:]),
        "updates": updates,
        "interval": INTERVAL,
        "kills": len(done),
        "aimed_at_a_save": sum(kill.aimed == "save" for kill in done),
        "tmp_was_there": sum(kill.tmp_there for kill in done),
        "lost_updates": {"most": max(lost), "mean": round(sum(lost) / len(lost), 2)},
        "rejected": dict(kinds),
        "same_bytes": same,
        "each": [kill._asdict() for kill in done],
    }


def _cpu() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--updates", type=int, default=600, help="of the run; about 3 are made between two kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmtrain-chaos-") as name:
        folder = Path(name)
        config = prepared_config(folder)
        result = chaos(
            config,
            folder,
            kills=words.kills,
            updates=words.updates,
            seed=words.seed,
            say=lambda text: print(text, flush=True),
        )
    result["seconds"] = round(time.monotonic() - began)
    print(json.dumps({key: value for key, value in result.items() if key != "each"}, indent=1))
    if words.out is not None:
        words.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(result["same_bytes"].values()))


def prepared_config(folder: Path) -> dict[str, Any]:
    """The tests' small run, its data prepared in `folder`."""
    config = small_config(folder / "data", text_folder(folder / "text"))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        llmtrain_main(["prepare", "--config", str(path), "--workers", "1"])
    return config


if __name__ == "__main__":
    main()
