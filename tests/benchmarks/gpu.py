"""What does one GPU do: how fast, in how much memory, how exactly, and beside Hugging Face's Llama in a bare loop?

    python -m tests.benchmarks.gpu --minutes 9          # writes tests/benchmarks/results/gpu_NAME.json
    python -m tests.benchmarks.gpu --only 7b "1b hf"    # some parts; the file keeps the others
    python -m tests.benchmarks.gpu --cpu                # the same path on a CPU in tiny shapes

The parts come in the order of what they are worth. Each is a process of its own with a limit of its own, and its result
is written as soon as it is there; what does not fit into the minutes is told and left out.

Speed: LLaMA-7B whole at sequence 2048, `1b` at 4096; bf16 with fp32 masters and moments, updates of 65,536 tokens of
random numbers, compiled, weights drawn on the device (`gpu_bench`). The micro-batch is the largest that the plan says
fits below half the batch; nothing is recomputed where that fits, then what is cheap, then every block. Where the GPU
says otherwise the next choice is tried. HF's loop (`gpu_hf`) is planned as ZeRO-0, which holds the same.

Exactness: `verify-resume` of every engine at `125m` and sequence 2048, several at a time (`gpu_verify`). Then the tests
that need a GPU, the kernels of attention, and one rank of many under FSDP2 over torch's fake process group
(`gpu_fake`): its memory, and its computation without communication.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.planner.fit import changed, largest_micro, needs
from llmtrain.planner.gpus import GIB, Gpu
from tests.benchmarks.gpu_table import show

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
RECOMPUTE = ("none", "cheap", "all")
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


class Outcome(NamedTuple):
    """The JSON objects that a process printed, and what else it said."""

    rows: list[dict[str, Any]]
    said: str
    ended_well: bool = True

    @property
    def out_of_memory(self) -> bool:
        return not self.rows and any(text in self.said.lower() for text in OUT_OF_MEMORY)

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


Run = Callable[[list[str], float], Outcome]


@dataclass(frozen=True)
class Part:
    """Something to find out. `least_s` are the seconds it needs to be worth a start, `most_s` all it may have."""

    name: str
    module: str
    words: tuple[str, ...] = ()
    least_s: float = 30
    most_s: float = 120
    config: str | None = None  # of a speed: it is fitted into the GPU
    overrides: tuple[str, ...] = ()


BF16 = ("data.path=none", "batch.global_tokens=64K", "batch.micro=1", "engine.precision=bf16", "engine.compile=true")
SEVEN = ("configs/7b_cosine.yaml", (*BF16, "batch.seq_len=2048"))
ONE = ("configs/1b_cosine.yaml", (*BF16, "model.max_seq_len=4096", "batch.seq_len=4096"))
TINY = (
    "configs/demo_cosine.yaml",
    ("data.path=none", "batch.global_tokens=256", "batch.micro=1", "batch.seq_len=64", "engine.precision=fp32"),
)
EXACT = "engine.deterministic=true"
BENCH, HF = "tests.benchmarks.gpu_bench", "tests.benchmarks.gpu_hf"


def speed(
    name: str, shape: tuple[str, tuple[str, ...]], *overrides: str, words: tuple[str, ...] = (), least_s: float = 40
) -> Part:
    """A part that measures updates of a shape."""
    module = HF if name.endswith("hf") else BENCH
    kind = () if any(override.startswith("engine.kind") for override in overrides) else ("engine.kind=single",)
    return Part(name, module, words, least_s, 240, shape[0], (*shape[1], *kind, *overrides))


PARTS = (
    speed("7b", SEVEN, words=("--steps", "5"), least_s=75),
    speed("1b", ONE, words=("--steps", "8", "--kernels")),
    speed("1b hf", ONE, words=("--steps", "6"), least_s=120),  # the whole model is compiled
    Part("verify", "tests.benchmarks.gpu_verify", least_s=120, most_s=300),
    speed("7b deterministic", SEVEN, EXACT, words=("--steps", "3"), least_s=55),
    speed("1b deterministic", ONE, EXACT, words=("--steps", "5"), least_s=30),
    speed("7b fp8", SEVEN, "engine.fp8=rowwise", words=("--steps", "3"), least_s=55),
    speed("1b fsdp", ONE, "engine.kind=fsdp", words=("--steps", "5")),
    speed("1b zero1", ONE, "engine.kind=deepspeed", "engine.zero_stage=1", words=("--steps", "5")),
    speed("7b fsdp", SEVEN, "engine.kind=fsdp", words=("--steps", "3"), least_s=60),
    speed("7b kernels", SEVEN, words=("--steps", "2", "--kernels"), least_s=75),
    Part("tests", "pytest", ("-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"), 60, 180),
    Part("attention", "tests.benchmarks.attention", least_s=60, most_s=180),
    Part("7b, rank of 8", "tests.benchmarks.gpu_fake", ("--preset", "llama-7b", "--ranks", "8"), 40),
    Part("7b, rank of 64", "tests.benchmarks.gpu_fake", ("--preset", "llama-7b", "--ranks", "64"), 40),
    Part("70b, rank of 64", "tests.benchmarks.gpu_fake", ("--preset", "llama3-70b", "--ranks", "64"), 60),
)
CPU_PARTS = (
    speed("tiny", TINY, words=("--steps", "2", "--kernels")),
    speed("tiny deterministic", TINY, EXACT, words=("--steps", "2")),
    speed("tiny hf", TINY, words=("--steps", "2")),
    Part("verify", "tests.benchmarks.gpu_verify", ("--tiny",)),
    Part("attention", "tests.benchmarks.attention", ("--tiny", "--kernels", "flash")),
    Part("tiny, rank of 8", "tests.benchmarks.gpu_fake", ("--preset", "tiny", "--ranks", "8")),
)


class Attempt(NamedTuple):
    """What one process recomputes, its micro-batch, and the bytes that the plan says it needs."""

    recompute: str
    micro: int
    planned: int


def ladder(config: Config, gpu: Gpu) -> list[Attempt]:
    """What the plan says fits, in the order of trying: little recomputed first, then large micro-batches first."""
    found = []
    for choice in RECOMPUTE:
        asked = changed(config, {"activation_checkpointing": choice})
        # At most half the batch: gradients accumulate, as in every batch that a model of this size is trained on.
        for micro in range(largest_micro(asked, 1, gpu, at_most=config.batch.sequences // 2) or 0, 0, -1):
            if config.batch.sequences % micro == 0:
                planned = needs(changed(asked, {}, micro), 1)
                assert planned is not None
                found.append(Attempt(choice, micro, planned))
    return found


def attempts(part: Part, gpu: Gpu) -> list[list[str]]:
    """The words of each process that may answer a part, in the order of trying; none where nothing fits."""
    if part.config is None:
        return [[part.module, *part.words]]
    config = load_config(ROOT / part.config, list(part.overrides))
    if part.module == HF:
        config = changed(config, {"kind": "deepspeed", "zero_stage": 0, "compile": False})
    found = [one for one in ladder(config, gpu) if part.module != HF or one.recompute != "cheap"]
    return [
        [part.module, "--config", str(ROOT / part.config), *_pairs(part, attempt), *part.words] for attempt in found
    ]


def _pairs(part: Part, attempt: Attempt) -> Iterator[str]:
    chosen = (f"engine.activation_checkpointing={attempt.recompute}", f"batch.micro={attempt.micro}")
    for override in (*part.overrides, *chosen):
        yield from ("--set", override)


def as_process(words: list[str], limit_s: float, device: str = "cuda") -> Outcome:
    """Run `python -m WORDS`; every line of stdout that is a JSON object is a row of its answer."""
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # Files and no pipes: a compiler's workers may hold a pipe open after the process has ended.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        code: int | None = None
        try:
            command = [sys.executable, "-m", *words]
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=out, stderr=errors, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"no answer in {limit_s:.0f} s", file=errors)
        out.seek(0)
        errors.seek(0)
        return answer(out.read(), errors.read(), code == 0)


def answer(out: str, errors: str, ended_well: bool = True) -> Outcome:
    """The JSON objects in what a process printed, and the rest of it."""
    lines = out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    others = "\n".join(line for line in lines if not line.startswith("{"))
    return Outcome(rows, f"{errors}\n{others}", ended_well)


def find_out(part: Part, gpu: Gpu, limit_s: float, run: Run) -> dict[str, Any]:
    """A part's result: its rows, the command, how long it took, and where it failed why."""
    if part.module == HF and find_spec("transformers") is None:
        return {"why": "transformers is missing: pip install 'llmtrain[hf]'"}
    begin, tried = time.monotonic(), []
    for words in attempts(part, gpu):
        outcome = run(words, limit_s - (time.monotonic() - begin))
        ended = "out of memory" if outcome.out_of_memory else "ended" if outcome.ended_well else "failed"
        command = " ".join(["python", "-m", *(word.removeprefix(f"{ROOT}/") for word in words)])
        tried.append({"command": command, "ended": ended})
        if outcome.out_of_memory:
            continue
        found = {"rows": outcome.rows, "tried": tried, "seconds": round(time.monotonic() - begin, 1)}
        if part.module == "pytest":
            found["rows"] = [{"tests": _last_summary(outcome.said)}]
        if not outcome.ended_well:
            found["why"] = outcome.last_line
            tell("\n".join(f"    {line[:300]}" for line in outcome.said.splitlines()[-15:]))
        return found
    return {"why": "out of memory" if tried else "the plan says that it does not fit", "tried": tried}


def _last_summary(said: str) -> str:
    lines = [line for line in said.splitlines() if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    return lines[-1].strip() if lines else "no summary"


def find_device(cpu: bool) -> tuple[Gpu, dict[str, Any]]:
    """The first GPU and what is known of it, or with `cpu`, or where there is none, the CPU in a GPU's place."""
    found: dict[str, Any] = {}
    if not cpu:
        probed = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
        if probed.returncode:
            sys.exit(f"torch cannot say which GPU is here: {answer('', probed.stderr).last_line}")
        found = json.loads(probed.stdout)
    if not found:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Gpu("cpu", held, None), {"name": "cpu", "memory_gib": round(held / GIB, 1)}
    taken = found["memory"] - found["free"]
    if taken > OTHERS_BYTES:
        tell(f"WARNING {taken / GIB:.1f} GiB of {found['name']} are taken already: the plan does not know of them")
    return Gpu(found["name"], found["memory"], None), {"name": found["name"], **_machine(found["memory"])}


def _machine(memory: int) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = ""
    if shutil.which("nvidia-smi"):
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {"memory_gib": round(memory / GIB, 2), "driver": driver, "cores": os.cpu_count()}


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="all that is not done by then is left out")
    parser.add_argument("--only", nargs="+", metavar="PART", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--cpu", action="store_true", help="as where there is no GPU: tiny shapes")
    parser.add_argument("--out", type=Path, help="[tests/benchmarks/results/gpu_NAME.json, on a CPU none]")
    given = parser.parse_args(arguments)
    names = {part.name for part in (*PARTS, *CPU_PARTS)}
    for name in given.only or ():
        if name not in names:
            parser.error(f'--only "{name}": choose from {", ".join(sorted(names))}')
    return given


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> None:
    """Find out what the command line asks for, part after part, and show it."""
    begin = time.monotonic()
    given = _asked(arguments)
    gpu, device = find_device(given.cpu)
    on_cpu = gpu.name == "cpu"
    if given.out is None and not on_cpu:
        given.out = RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', gpu.name.lower()).strip('_')}.json"
    run = run or (lambda words, limit_s: as_process(words, limit_s, "cpu" if on_cpu else "cuda"))
    result = _earlier(given.out, device)
    for part in CPU_PARTS if on_cpu else PARTS:
        if given.only and part.name not in given.only:
            continue
        left = given.minutes * 60 - (time.monotonic() - begin)
        if left < part.least_s:
            tell(f"{part.name}: left out, {left:.0f} s are left and it needs {part.least_s:.0f}")
            continue
        tell(f"{part.name}: at {time.monotonic() - begin:.0f} s")
        result["parts"][part.name] = {**find_out(part, gpu, min(left, part.most_s), run), "on": time.strftime("%F")}
        if given.out is not None:
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def _earlier(out: Path | None, device: dict[str, Any]) -> dict[str, Any]:
    """The file's content where it is of the same device, else that of a new one."""
    new: dict[str, Any] = {"command": "python -m tests.benchmarks.gpu", "device": device, "parts": {}}
    if out is None or not out.exists():
        return new
    kept: dict[str, Any] = json.loads(out.read_text())
    return {**new, "parts": kept.get("parts", {})} if kept["device"]["name"] == device["name"] else new


if __name__ == "__main__":
    main()
