"""How fast is training on one GPU, in how much memory, and beside Hugging Face's Llama in a bare loop?

    python -m tests.benchmarks.gpu                                   # writes tests/benchmarks/results/gpu_NAME.json
    python -m tests.benchmarks.gpu --shapes 7b --engines single      # one case; the file keeps the others
    python -m tests.benchmarks.gpu --cpu                             # the same path on a CPU in a tiny shape

Shapes: LLaMA-7B whole at sequence 2048, and `1b` at 4096, both compiled, bf16 with fp32 masters and moments. Every case
is a process of its own, so that memory starts clean: `llmtrain bench` under `single` and under `fsdp` on one rank, and
`gpu_hf`. Nothing is recomputed where the plan says that fits, else every block; the micro-batch is the largest the plan
says fits below the whole batch, and where the GPU says otherwise the next one. All cases take turns, round after round,
each round in an order moved on by one; a ratio is ours over theirs within a round. ZeRO-1 and ZeRO-2 are only planned:
on one GPU they shard nothing and hold as much as `single` or more.

HF's loop is planned as ZeRO-0, which holds the same: fp32 weights, gradients and moments, and what autocast copies. Its
whole logits come on top, so it may end lower. No checkpoint is written. Processes allocate in expandable segments
unless PYTORCH_ALLOC_CONF says otherwise. The file is written after every turn. A case that fails is told, and the
others go on.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.model.size import parameter_count
from llmtrain.planner.fit import LAYOUTS, changed, changes, largest_micro, needs
from llmtrain.planner.gpus import GIB, Gpu
from llmtrain.planner.memory import memory
from llmtrain.planner.plan import describe
from tests.benchmarks.gpu_table import show

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
HF = "hf"
ENGINES = {"single": LAYOUTS["single"], "fsdp": LAYOUTS["fsdp"], HF: LAYOUTS["zero 0"]}
NOT_RUN = ("zero 1", "zero 2")
RECOMPUTE = ("none", "all")
STATE = ("weights", "masters", "moments", "gradients")
OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed")
OTHERS_BYTES = 2 * GIB  # what a GPU holds before anything is started, its driver's context among it
PROBE = """
import json, torch
found = {}
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info(0)
    found = {"name": torch.cuda.get_device_name(0), "memory": total, "free": free}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Shape:
    """What is trained: a config of the repository and what is changed in it."""

    config: str
    overrides: tuple[str, ...]


GPU_OVERRIDES = ("data.path=none", "batch.global_tokens=64K", "batch.micro=1", "engine.precision=bf16")
SHAPES = {
    "7b": Shape("configs/7b_cosine.yaml", (*GPU_OVERRIDES, "batch.seq_len=2048", "engine.compile=true")),
    "1b": Shape(
        "configs/1b_cosine.yaml",
        (*GPU_OVERRIDES, "model.max_seq_len=4096", "batch.seq_len=4096", "engine.compile=true"),
    ),
}
CPU_SHAPES = {
    "tiny": Shape(
        "configs/demo_cosine.yaml",
        ("data.path=none", "batch.global_tokens=256", "batch.micro=1", "batch.seq_len=64", "engine.precision=fp32"),
    )
}


class Attempt(NamedTuple):
    """Settings of one process, and the bytes that the plan says it needs."""

    recompute: str
    micro: int
    planned: int


class Outcome(NamedTuple):
    """What a process answered, or what it said instead."""

    result: dict[str, Any] | None
    said: str

    @property
    def out_of_memory(self) -> bool:
        return self.result is None and any(text in self.said.lower() for text in OUT_OF_MEMORY)

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


Run = Callable[[list[str], float], Outcome]


@dataclass
class Case:
    """One engine on one shape: what may still be tried, what was, and the results of its rounds."""

    engine: str
    ladder: list[Attempt]
    why: str | None = None  # where it is not measured, or not to the end
    tried: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def chosen(self) -> Attempt | None:
        return self.ladder[0] if self.rounds else None


def as_process(words: list[str], limit_s: float, device: str = "cuda") -> Outcome:
    """Run `python -m WORDS`; its answer is the last line of stdout that is a JSON object."""
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # Files and no pipes: a compiler's workers may hold a pipe open after the process has ended.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            command = [sys.executable, "-m", *words]
            ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=errors, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Outcome(None, f"no answer in {limit_s:.0f} s (--limit-s)")
        out.seek(0)
        errors.seek(0)
        return answer(out.read(), errors.read() or f"exit code {ended.returncode}")


def answer(out: str, said: str) -> Outcome:
    """The JSON object that was printed last, or what was said instead."""
    objects = [line for line in out.splitlines() if line.startswith("{")]
    return Outcome(json.loads(objects[-1]), "") if objects else Outcome(None, said)


def ladder(config: Config, engine: str, gpu: Gpu, recompute: Sequence[str]) -> list[Attempt]:
    """What the plan says fits, in the order of trying: little recomputed first, then large micro-batches first."""
    found = []
    for choice in recompute:
        asked = changed(config, {**ENGINES[engine], "activation_checkpointing": choice})
        # At most half the batch: gradients accumulate, as in every batch that a model of this size is trained on.
        for micro in range(largest_micro(asked, 1, gpu, at_most=config.batch.sequences // 2) or 0, 0, -1):
            if config.batch.sequences % micro == 0:
                planned = needs(changed(asked, {}, micro), 1)
                assert planned is not None
                found.append(Attempt(choice, micro, planned))
    return found


def open_case(config: Config, engine: str, gpu: Gpu, recompute: Sequence[str]) -> Case:
    """The case with its ladder, or with why there is none."""
    if engine == HF and find_spec("transformers") is None:
        return Case(engine, [], "transformers is missing: pip install 'llmtrain[hf]'")
    found = ladder(config, engine, gpu, recompute)
    if found:
        return Case(engine, found)
    asked = changed(config, {**ENGINES[engine], "activation_checkpointing": recompute[-1]})
    offers = [] if engine == HF else changes(asked, 1, gpu)
    instead = f"; {describe(offers[0])}" if offers else ""
    return Case(engine, [], f"does not fit: {_size(needs(asked, 1))} of {_size(gpu.usable)} GiB at least{instead}")


def words_of(shape: Shape, engine: str, attempt: Attempt, steps: int) -> list[str]:
    """The module and the words that measure one attempt."""
    kind = "single" if engine == HF else engine
    overrides = [
        *shape.overrides,
        f"engine.kind={kind}",
        f"engine.activation_checkpointing={attempt.recompute}",
        f"batch.micro={attempt.micro}",
    ]
    module = ["tests.benchmarks.gpu_hf"] if engine == HF else ["llmtrain", "bench"]
    pairs = [word for override in overrides for word in ("--set", override)]
    return [*module, "--config", str(ROOT / shape.config), *pairs, "--steps", str(steps), "--json"]


def turn(case: Case, shape: Shape, steps: int, limit_s: float, run: Run) -> None:
    """One round of a case: the first attempt of its ladder that does not run out of memory, kept from then on."""
    while case.ladder and case.why is None:
        attempt = case.ladder[0]
        outcome = run(words_of(shape, case.engine, attempt, steps), limit_s)
        ended = "out of memory" if outcome.out_of_memory else "measured" if outcome.result else "failed"
        case.tried.append({**attempt._asdict(), "ended": ended})
        tell(f"  {case.engine}, micro-batch {attempt.micro}, recompute {attempt.recompute}: {ended}")
        if outcome.result is not None:
            case.rounds.append(outcome.result)
            case.ladder = [attempt]
            return
        if not outcome.out_of_memory:
            case.why = f"failed: {outcome.last_line}"
            tell("\n".join(f"    {line}" for line in outcome.said.splitlines()[-15:]))
        elif case.rounds or len(case.ladder) == 1:
            case.why = f"out of memory at micro-batch {attempt.micro}, recompute {attempt.recompute}"
        else:
            case.ladder.pop(0)


def facts(case: Case, theirs: Case | None) -> dict[str, Any]:
    """A case as JSON: its median round in short, its ratios to `theirs`, and all it did."""
    found: dict[str, Any] = {"measured": bool(case.rounds), "why": case.why, "tried": case.tried}
    if case.chosen is None:
        return found
    middle = sorted(case.rounds, key=lambda one: float(one["step_s"]))[len(case.rounds) // 2]
    planned = middle.get("planned_gib")
    ratios = [
        round(ours["tokens_per_s"] / other["tokens_per_s"], 4)
        for ours, other in zip(case.rounds, theirs.rounds if theirs else [], strict=False)
    ]
    return found | {
        "micro": case.chosen.micro,
        "recompute": case.chosen.recompute,
        **{key: middle.get(key) for key in ("step_s", "tokens_per_s", "mfu", "hfu", "phases_s", "memory_gib")},
        "planned_gib": planned,
        "memory_of_plan": None if planned is None else round(middle["memory_gib"] / planned, 4),
        "ratios_to_hf": ratios,
        "ratio_to_hf": round(median(ratios), 4) if ratios else None,
        "rounds": case.rounds,
    }


def only_planned(config: Config, layout: str, gpu: Gpu) -> dict[str, Any]:
    """What a layout that is not run would hold, every block recomputed and micro-batches of one; it is told."""
    found = memory(changed(config, {**LAYOUTS[layout], "activation_checkpointing": "all"}, 1), 1)
    each = sum(found.kinds.get(kind, 0) for kind in STATE) / parameter_count(config.model)
    fits = "that fits" if found.total <= gpu.usable else "too much"
    why = (
        f"not run: one GPU has nothing to shard, and it holds {each:.1f} B a parameter, {_size(found.total)} of "
        f"{_size(gpu.usable)} GiB at least ({fits}): use single or fsdp"
    )
    tell(f"  WARNING {layout}: {why}")
    planned = {"planned_gib": round(found.total / GIB, 3), "bytes_a_parameter": round(each, 2)}
    return {"measured": False, "why": why, "tried": [], **planned}


def measure(
    shape: Shape, gpu: Gpu, given: argparse.Namespace, run: Run, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All cases of a shape, in turns. `keep` takes what is known after every turn."""
    config = load_config(ROOT / shape.config, list(shape.overrides))
    recompute = RECOMPUTE if given.recompute is None else (given.recompute,)
    cases = [open_case(config, engine, gpu, recompute) for engine in given.engines]
    about = {
        "config": shape.config,
        "overrides": list(shape.overrides),
        "parameters": parameter_count(config.model),
        "seq_len": config.batch.seq_len,
        "tokens_per_update": config.batch.tokens,
    }
    planned = {layout: only_planned(config, layout, gpu) for layout in NOT_RUN}
    theirs = next((case for case in cases if case.engine == HF), None)

    def found() -> dict[str, Any]:
        told = [case for case in cases if case.tried or case.why]
        ours = {case.engine: facts(case, None if case is theirs else theirs) for case in told}
        return {**about, "cases": {**ours, **planned}}

    for case in cases:
        if case.why is not None:
            tell(f"  {case.engine}: {case.why}")
    for index in range(given.rounds):
        at = index % len(cases)
        for case in cases[at:] + cases[:at]:
            turn(case, shape, given.steps, given.limit_s, run)
            keep(found())
    return found()


def find_device(cpu: bool) -> tuple[Gpu, dict[str, Any]]:
    """The first GPU and what is known of it, or with `cpu`, or where there is none, the CPU in a GPU's place."""
    found: dict[str, Any] = {}
    if not cpu:
        probed = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
        if probed.returncode:
            sys.exit(f"torch cannot say which GPU is here: {Outcome(None, probed.stderr).last_line}")
        found = json.loads(probed.stdout)
    if not found:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Gpu("cpu", held, None), {"name": "cpu", "memory_gib": round(held / GIB, 1)}
    taken = found["memory"] - found["free"]
    if taken > OTHERS_BYTES:
        tell(f"WARNING {_size(taken)} GiB of {found['name']} are taken already: the plan does not know of them")
    about = {"name": found["name"], "memory_gib": round(found["memory"] / GIB, 2), "taken_gib": round(taken / GIB, 2)}
    return Gpu(found["name"], found["memory"], None), about


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def _size(count: int | None) -> str:
    """Bytes in GiB."""
    return "?" if count is None else f"{count / GIB:.1f}"


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="on a GPU")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--recompute", choices=RECOMPUTE, help="this, whatever the plan says")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="timed updates of a turn [10, on a CPU 2]")
    parser.add_argument("--limit-s", type=float, default=900, help="longest that one process may take")
    parser.add_argument("--cpu", action="store_true", help="as where there is no GPU: a tiny shape")
    parser.add_argument("--out", type=Path, help="[tests/benchmarks/results/gpu_NAME.json, on a CPU none]")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or (given.steps is not None and given.steps < 1):
        parser.error("--rounds and --steps must be at least 1")
    return given


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> None:
    given = _asked(arguments)
    gpu, device = find_device(given.cpu)
    on_cpu = gpu.name == "cpu"
    given.steps = given.steps or (2 if on_cpu else 10)
    if given.out is None and not on_cpu:
        given.out = RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '_', gpu.name.lower())}.json"
    shapes = CPU_SHAPES if on_cpu else {name: SHAPES[name] for name in given.shapes}
    start = run or (lambda words, limit_s: as_process(words, limit_s, "cpu" if on_cpu else "cuda"))
    result = _earlier(given.out, device)
    for name, shape in shapes.items():
        label = name if given.recompute is None else f"{name}, recompute {given.recompute}"
        tell(f"{label} on {gpu.name}, {_size(gpu.usable)} GiB for tensors")
        earlier = result["shapes"].get(label, {"cases": {}})["cases"]

        def keep(found: dict[str, Any], label: str = label, earlier: dict[str, Any] = earlier) -> None:
            result["shapes"][label] = {**found, "cases": {**earlier, **found["cases"]}}
            if given.out is not None:
                given.out.write_text(json.dumps(result, indent=1) + "\n")

        keep(measure(shape, gpu, given, start, keep))
    show(result)


def _earlier(out: Path | None, device: dict[str, Any]) -> dict[str, Any]:
    """The file's content where it is of the same device, else that of a new one."""
    new: dict[str, Any] = {"command": "python -m tests.benchmarks.gpu", "device": device, "shapes": {}}
    if out is None or not out.exists():
        return new
    kept: dict[str, Any] = json.loads(out.read_text())
    return {**new, "shapes": kept["shapes"]} if kept["device"]["name"] == device["name"] else new


if __name__ == "__main__":
    main()
