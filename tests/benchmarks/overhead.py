"""What do validation, logging and asynchronous checkpoints cost? Prints one JSON object; `--out FILE` keeps it.

    python -m tests.benchmarks.overhead --out tests/benchmarks/results/overhead.json

The model and batch of the peers' benchmark is trained twice at the same time, by two processes of one thread, each on a
core of its own: by the bare engine over the run's batches, and by `llmtrain train` as users have it: every update
logged, a validation of 2 % as many tokens as were trained on and an asynchronous checkpoint every 100 updates. Then the
two change cores. What disturbs the machine disturbs both, and thread and core share what a checkpoint's writer needs,
as they would not on a larger machine. Times are from update 11 to the last, which has no validation and no save; each
ratio is full over bare. Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.distributed import World
from llmtrain.engines.base import Engine
from tests.benchmarks.peers.work import BETAS, CLIP, DECAY, FFN, HEADS, LAYERS, MICRO, PEAK, SEQ, VOCAB, WIDTH

ROOT = Path(__file__).parent.parent.parent
EVERY = 100  # updates between validations and between checkpoints
FIRST = 11  # the update that is timed first


def config_of(folder: Path, updates: int) -> Config:
    """The peers' model on the text of this repository's documents."""
    return validate(
        {
            "run": {"name": "overhead", "dir": str(folder / "run")},
            "model": {
                "hidden_size": WIDTH,
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "ffn_size": FFN,
                "vocab_size": VOCAB,
                "max_seq_len": SEQ,
            },
            "data": {
                "path": str(folder / "data"),
                "source": {"kind": "text", "paths": [str(path) for path in sorted((ROOT / "docs").glob("*.md"))]},
                "tokenizer": {"kind": "sentencepiece", "vocab_size": 1000},
                "validation_fraction": 0.2,
            },
            "batch": {"global_sequences": MICRO, "micro": MICRO, "seq_len": SEQ},
            "optim": {"betas": BETAS, "weight_decay": DECAY, "clip": CLIP},
            "schedule": {"name": "constant", "peak": PEAK, "horizon": f"{updates} steps"},
            "engine": {"kind": "single", "precision": "fp32"},
            "validation": {"every": f"{EVERY} steps", "max_tokens": EVERY * MICRO * SEQ // 50},
            "checkpoint": {"every": f"{EVERY} steps", "async_save": True},
        },
        "overhead",
    )


def run_one(kind: str, folder: Path, updates: int) -> None:
    """Train in this process and print the seconds from the first timed update to the end of the last."""
    import torch

    from llmtrain.data.dataset import open_data
    from llmtrain.distributed import open_world
    from llmtrain.engines import build_engine
    from llmtrain.train.feed import train_batches
    from llmtrain.train.run import train
    from llmtrain.train.start import InitialValues

    config = config_of(folder, updates)
    marks: list[float] = []

    def marked(config: Config, world: World) -> Engine:
        engine = build_engine(config, world)
        step = engine.train_step

        def timed(*arguments: Any) -> Any:
            if engine.state().update == FIRST - 1:
                marks.append(time.perf_counter())
            stats = step(*arguments)
            if engine.state().update == updates:
                marks.append(time.perf_counter())
            return stats

        engine.train_step = timed  # type: ignore[method-assign]
        return engine

    if kind == "full":
        train(config, prepare_command="", build=marked)
    else:
        torch.set_float32_matmul_precision("medium")
        with open_world(600, collectives=False) as world:
            engine = marked(config, world)
            engine.load(InitialValues(config), 0)
            for micro_batches in train_batches(config, world, open_data(config.data.path)).iterate(1, updates):
                engine.train_step(micro_batches, 1.0, 1.0)
    print(json.dumps(marks[1] - marks[0]))


def pair(folder: Path, updates: int, cores: dict[str, int]) -> float:
    """Seconds of the full training over those of the bare one, both at once on these cores."""
    running = {}
    for kind, core in cores.items():
        own = folder / f"{kind}_{core}"
        own.mkdir()
        (own / "data").symlink_to(folder / "data")
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.overhead",
            "--one",
            kind,
            str(own),
            "--updates",
            str(updates),
        ]
        running[kind] = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    seconds = {kind: float(process.communicate()[0].splitlines()[-1]) for kind, process in running.items()}
    return seconds["full"] / seconds["bare"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2 * EVERY + 50)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help="what each of the two processes is told")
    given = parser.parse_args()
    if given.one is not None:
        run_one(given.one[0], Path(given.one[1]), given.updates)
        return
    ratios = []
    for turn in range(given.pairs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _prepare(config_of(folder, given.updates))
            ratios.append(round(pair(folder, given.updates, {"full": turn % 2, "bare": 1 - turn % 2}), 4))
        print(f"pair {turn + 1}: {ratios[-1]}", file=sys.stderr, flush=True)
    result = {
        "command": " ".join(["python -m tests.benchmarks.overhead", *sys.argv[1:]]),
        "updates": given.updates,
        "validation_and_checkpoint_every": EVERY,
        "full_over_bare": ratios,
        "geometric_mean": round(geometric_mean(ratios), 4),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


def _prepare(config: Config) -> None:
    from llmtrain.data.prepare import prepare

    prepare(config.data, workers=1, model_vocab_size=VOCAB)


if __name__ == "__main__":
    main()
