"""Is what `llmtrain plan` says an engine holds what it holds, for every preset up to 1b?

    python -m tests.benchmarks.memory --out tests/benchmarks/results/memory.json

Bytes of weights, masters, moments, gradients (before an update, when its last micro-batch begins, when the weights
change), of the average and of one chunk of logits, counted in the storages of live tensors on the rank that holds most,
beside the bytes planned. Small models run on real ranks (`real`). Large ones run without memory, one rank at a time
(`hollow`, see `tests/hollow.py`); where both ways were measured, the row says whether they agree. The peak is told
apart, because only that of fp32 says something: a CPU makes fp32 copies of bf16 operands, and what a GPU would leave to
the host is on the CPU too. Then what micro-batches keep for their backward pass, and what a checkpoint takes.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import llmtrain
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import Config
from llmtrain.distributed import World, open_world
from llmtrain.model.size import parameter_count
from llmtrain.planner.memory import checkpoint_bytes
from llmtrain.train.average import build
from tests import ranks
from tests.benchmarks.saving import cpu_name
from tests.hollow import Hollow, alone
from tests.ledger import LAYOUTS, Constant, kept_for_backward, measured, planned, run_config

MICRO, SEQ_LEN = 2, 64
PRESETS = ("tiny", "60m", "125m", "350m", "1b")
REAL = {"tiny": (1, 2, 3), "60m": (1, 2, 3), "125m": (1,)}  # preset: numbers of ranks
HOLLOW = {"tiny": (1, 2, 3), "60m": (2,), "125m": (1, 2, 3), "350m": (1, 2, 3), "1b": (1, 2, 3)}
EVERYWHERE = ("single", "fsdp", "zero 0", "zero 1", "zero 2", "zero 3")
KEPT_SEQ_LEN = 512
PATIENCE_S = 1800


class Case(NamedTuple):
    """A preset in a layout on so many ranks, measured in one of the two ways."""

    way: str
    preset: str
    layout: str
    ranks: int

    @property
    def config(self) -> Config:
        return run_config(self.preset, LAYOUTS[self.layout], self.ranks, MICRO, SEQ_LEN)


def cases(presets: list[str]) -> Iterator[Case]:
    """Variants of a layout on two ranks, or on the one they run on."""
    for preset in presets:
        for way, counts in (("hollow", HOLLOW), ("real", REAL)):
            for count in counts.get(preset, ()):
                for layout in LAYOUTS:
                    single = layout.startswith("single")
                    if (count == 1 or not single) and (
                        layout.rpartition(" ")[0] in EVERYWHERE or count == (1 if single else 2)
                    ):
                        yield Case(way, preset, layout, count)


def run_real(case: Case, output: Path) -> None:
    """On every rank of a real group."""
    with open_world(600, collectives=True) as world:
        (output / f"{world.rank}.json").write_text(json.dumps(measured(case.config, world)))


def run_hollow(case: Case, rank: int, output: Path) -> None:
    """On one rank, without memory."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(case.ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(case.ranks)
    )
    with alone(rank, case.ranks) as world, Hollow():
        (output / f"{rank}.json").write_text(json.dumps(measured(case.config, world)))


def measure(case: Case) -> dict[str, Any]:
    """A row: bytes measured, planned, and by how much the plan is off, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        if case.way == "real":
            legs = iter([ranks.start(output / "logs", case.ranks, run_real, case, output)])
        else:  # started one after another, as each is waited for
            legs = (
                ranks.start(output / f"log_{rank}", 1, run_hollow, case, rank, output) for rank in range(case.ranks)
            )
        row: dict[str, Any] = {**case._asdict(), "bytes": {}, "planned": {}, "off": {}}
        try:
            for leg in legs:
                assert leg.wait(PATIENCE_S).count(0) == len(leg.processes), leg.text()
        except AssertionError as error:
            said = str(error).strip().splitlines() or ["a process was killed, most often because memory ran out"]
            return {**row, "not_measured": said[-1]}
        found = [json.loads(path.read_text()) for path in output.glob("*.json")]
    for what, plan in planned(case.config, case.ranks).items():
        held = max(one[what] for one in found)
        if held or plan:
            row["bytes"][what], row["planned"][what] = held, plan
            row["off"][what] = round(plan / held - 1, 5) if held else None
    return row


def worst(row: dict[str, Any]) -> float:
    """The largest relative difference of a row, its peak apart."""
    off = [value for what, value in row["off"].items() if what != "peak"]
    return max((abs(value) if value is not None else float("inf") for value in off), default=float("nan"))


def agree(rows: list[dict[str, Any]]) -> None:
    """Write into every hollow row whether real ranks hold the same, where they were measured."""
    real = {(row["preset"], row["layout"], row["ranks"]): row["bytes"] for row in rows if row["way"] == "real"}
    for row in rows:
        beside = real.get((row["preset"], row["layout"], row["ranks"]))
        if row["way"] == "hollow" and beside and row["bytes"]:
            row["as_real"] = {**row["bytes"], "peak": 0} == {**beside, "peak": 0}
            row["peak_as_real"] = row["bytes"]["peak"] == beside["peak"]


def kept(preset: str, choice: Any) -> dict[str, Any]:
    """What micro-batches of a preset leave for the backward pass, in fp32, with blocks recomputed as `choice` says."""
    engine = {"kind": "single", "precision": "fp32", "activation_checkpointing": choice}
    with Hollow():
        held, plan = kept_for_backward(run_config(preset, engine, 1, MICRO, KEPT_SEQ_LEN))
    return {
        "preset": preset,
        "activation_checkpointing": choice,
        "bytes": held,
        "planned": plan,
        "off": round(plan / held - 1, 5),
    }


def saved(preset: str, layout: str) -> dict[str, Any]:
    """What a checkpoint takes on disk."""
    config, world = run_config(preset, LAYOUTS[layout], 1, MICRO, SEQ_LEN), World(0, 1, 0, torch.device("cpu"))
    engine = build(config, world)
    engine.load(Constant(), 0)
    with tempfile.TemporaryDirectory() as folder:
        problem = CheckpointStore(folder, world, 2).save(engine.state(), {"step": 0})
        assert problem is None, problem
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    plan = checkpoint_bytes(config, parameter_count(config.model))
    return {"preset": preset, "layout": layout, "bytes": size, "planned": plan, "off": round(plan / size - 1, 5)}


def told(row: dict[str, Any]) -> str:
    head = f"{row['way']:6} {row['preset']:5} {row['layout']:36} {row['ranks']} ranks  "
    if "not_measured" in row:
        return f"{head}not measured: {row['not_measured']}"
    peak = f"{row['bytes']['peak'] / 2**20:9.1f} MiB at most ({row['off']['peak']:+.1%})"
    return f"{head}{worst(row):8.3%} off at worst  {peak}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--out", type=Path, help="written after every row; rows that are there are not measured again")
    asked = parser.parse_args()
    before = json.loads(asked.out.read_text()) if asked.out is not None and asked.out.exists() else {"rows": []}
    rows = {_key(row): row for row in before["rows"]}
    for case in cases(asked.presets):
        if _key(case._asdict()) not in rows:
            row = measure(case)
            rows[_key(row)] = row
            print(told(row), flush=True)
            if asked.out is not None:
                asked.out.write_text(json.dumps(result(list(rows.values()))) + "\n")
    extra: dict[str, Any] = {
        "kept_for_backward": [kept(preset, choice) for preset in asked.presets for choice in ("none", 2, "all")],
        "checkpoints": [
            saved(preset, layout)
            for preset in asked.presets
            if preset in REAL
            for layout in ("single bf16", "single, averaged bf16")
        ],
    }
    whole = {**result(list(rows.values())), **extra}
    for row in (*extra["kept_for_backward"], *extra["checkpoints"]):
        print(json.dumps(row))
    print(f"{len(rows)} rows: {whole['worst']:.3%} off at worst, hollow as real: {whole['as_real']}")
    if asked.out is not None:
        asked.out.write_text(json.dumps(whole) + "\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["way"], row["preset"], row["layout"], row["ranks"]


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept: the machine, the worst difference, and every row."""
    agree(rows)
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {
            "llmtrain": llmtrain.__version__,
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "python": platform.python_version(),
        },
        "micro": MICRO,
        "seq_len": SEQ_LEN,
        "worst": max((worst(row) for row in rows if "not_measured" not in row), default=None),
        "as_real": all(row["as_real"] for row in rows if "as_real" in row),
        "not_measured": [row for row in rows if "not_measured" in row],
        "rows": [row for row in rows if "not_measured" not in row],
    }


if __name__ == "__main__":
    main()
