"""Does every engine resume bit for bit on this GPU, with and without compilation, with and without documents apart?

    python -m tests.benchmarks.gpu_verify             # `125m` at sequence 2048, on one rank, each a JSON object
    python -m tests.benchmarks.gpu_verify --tiny      # the same path in a tiny shape, on a CPU

All run with `engine.deterministic: true`, several at a time. Legs are forked from a server that has torch loaded, or
are processes of their own where a GPU cannot be used after a fork. The vocabulary is that of the data, 2,048 pieces of
this repository's own source, so that a leg's record fits a disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from llmtrain.config_file import load_config
from llmtrain.train.verify import Layout, Leg, run_processes, verify
from tests import ranks

ROOT = Path(__file__).parent.parent.parent
AT, STEPS = 2, 4
AT_ONCE = 8
CASES = [
    (engine, compiled, masked)
    for compiled, masked in ((False, False), (True, True), (True, False), (False, True))
    for engine in ("single", "fsdp", "zero1", "zero2", "zero3")
]
TINY_CASES = [("single", False, False), ("fsdp", False, True)]


def described(folder: Path, tiny: bool) -> dict[str, Any]:
    """The run that is verified, without its engine."""
    model = {"preset": "tiny", "vocab_size": 512} if tiny else {"preset": "125m", "vocab_size": 2048}
    seq_len = 64 if tiny else 2048
    return {
        "run": {"name": "verify"},
        "model": {**model, "max_seq_len": seq_len},
        "data": {
            "path": str(folder / "data"),
            "source": {"kind": "text", "paths": [f"{ROOT}/llmtrain/{'model' if tiny else '**'}/*.py"]},
            "tokenizer": {"kind": "sentencepiece", "vocab_size": model["vocab_size"]},
            "validation_fraction": 0.5 if tiny else 0.05,
        },
        "batch": {"global_sequences": 8, "micro": 4, "seq_len": seq_len},
        "schedule": {"name": "cosine", "peak": 6e-4, "warmup": "2 steps", "horizon": "100 steps", "floor": 0.1},
        "engine": {"kind": "single", "precision": "bf16"},
    }


def touch_gpu() -> None:
    """In a fork: use the GPU, which fails where the server has used it."""
    torch.zeros(1, device="cuda")


def launcher(folder: Path) -> Callable[[Leg], None]:
    """What starts a leg: a fork, where that can use the GPU."""
    if torch.cuda.is_available() and ranks.start(folder / "fork", 1, touch_gpu).wait(60) != [0]:
        return run_processes

    def forked(leg: Leg) -> None:
        ranks.start(leg.out / "logs", leg.ranks, import_module(leg.module).main, leg.words).succeeded()

    return forked


def verified(case: tuple[str, bool, bool], path: Path, where: Path, launch: Callable[[Leg], None]) -> dict[str, Any]:
    """One verification's verdict. What it wrote is deleted."""
    engine, compiled, masked = case
    about = {"engine": engine, "compile": compiled, "document_mask": masked}
    folder, begin = Path(tempfile.mkdtemp(dir=where)), time.monotonic()
    config = load_config(path, [f"engine.compile={compiled}".lower(), f"data.document_mask={masked}".lower()])
    layout = Layout(engine, 1)
    try:
        found = verify(
            config,
            folder / "legs",
            prepare_command="llmtrain prepare",
            straight=layout,
            resumed=layout,
            at=AT,
            steps=STEPS,
            say=lambda text: None,
            launch=launch,
        )
        about |= {"verified": found.differs is None, "verdict": found.verdict}
    except Exception as error:
        about |= {"verified": False, "verdict": f"failed: {str(error).strip()[-600:]}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return about | {"seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    """Prepare the data, verify every case, print each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU does not start it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "verify.yaml"
        path.write_text(yaml.safe_dump(described(folder, given.tiny)))
        prepare = [sys.executable, "-m", "llmtrain", "prepare", "--config", str(path)]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
        launch = launcher(folder)
        places = [place for place in (folder, Path("/dev/shm")) if place.is_dir()]
        with ThreadPoolExecutor(2 if given.tiny else AT_ONCE) as pool:
            cases = TINY_CASES if given.tiny else CASES
            started = [
                pool.submit(verified, case, path, places[number % len(places)], launch)
                for number, case in enumerate(cases)
            ]
            for ended in as_completed(started):
                print(json.dumps(ended.result()), flush=True)


if __name__ == "__main__":
    main()
