"""How fast is data prepared and fed? Prints one JSON object; `--out FILE` keeps it.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.data_path --out tests/benchmarks/results/data_path.json

The text is Python's standard library, a file a document. Preparing it with `llmtrain prepare` in one process, written
to token files and synced, is compared with `datasets.Dataset.map(batched=True)` in one process with the same tokenizer,
which writes Arrow; both in turns, in MB/s of text; the ratio is ours over theirs. Feeding is what a rank's thread does
for one update of a million tokens: the order of samples, reading, and tensors; as the share of a step of a host that
trains on a million tokens a second, for the only rank and for each of eight.
"""

import argparse
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.data.dataset import open_data
from llmtrain.data.prepare import prepare
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.distributed import World
from llmtrain.train.feed import train_batches

VOCAB = 8000
SEQUENCES, SEQ = 512, 2048  # an update of about a million tokens


def config_of(folder: Path, name: str, text: Path, tokenizer: Path | None) -> Config:
    given = {"kind": "sentencepiece", "vocab_size": VOCAB, "sample_bytes": 3_000_000}
    if tokenizer is not None:
        given = {"kind": "model", "path": str(tokenizer)}
    return validate(
        {
            "run": {"name": "data_path"},
            "model": {"preset": "tiny", "vocab_size": VOCAB, "max_seq_len": SEQ},
            "data": {
                "path": str(folder / name),
                "source": {"kind": "text", "paths": [str(text)]},
                "tokenizer": given,
                "validation_fraction": 0.01,
            },
            "batch": {"global_sequences": SEQUENCES, "micro": 8, "seq_len": SEQ},
            "schedule": {"name": "constant", "peak": 1e-3, "horizon": "10 steps"},
        },
        "data_path",
    )


def documents(folder: Path) -> tuple[Path, list[str]]:
    """The standard library's modules as text files, and their contents."""
    folder.mkdir()
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            (folder / f"{len(texts):05d}.txt").write_text(texts[-1], encoding="utf-8")
    return folder, texts


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def mapped(texts: list[str], tokenizer: Tokenizer, cache: Path) -> None:
    """The same text through `datasets`: ids, one list a document, in an Arrow file."""
    source = Dataset.from_dict({"text": texts})
    source.map(
        lambda batch: {"ids": tokenizer.encode(batch["text"])},
        batched=True,
        remove_columns=["text"],
        cache_file_name=str(cache),
    )


def update_s(config: Config, ranks: int) -> float:
    """Seconds in which one of so many ranks orders, reads and batches its share of an update."""
    batches = train_batches(config, World(0, ranks, 0, torch.device("cpu")), open_data(config.data.path))
    return median(seconds(lambda k=k: batches.update(k)) for k in range(1, 30))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, texts = documents(folder / "text")
        megabytes = sum(len(one.encode()) for one in texts) / 1e6
        first = config_of(folder, "first", text, None)
        prepare(first.data, workers=1, model_vocab_size=VOCAB)
        model = folder / "first" / "tokenizer.model"
        ours, theirs = [], []
        for turn in range(given.turns):
            config = config_of(folder, f"turn_{turn}", text, model)
            ours.append(
                megabytes / seconds(lambda c=config: prepare(c.data, workers=1, model_vocab_size=VOCAB))  # type: ignore[misc]
            )
            cache = folder / f"turn_{turn}.arrow"
            theirs.append(megabytes / seconds(lambda c=cache: mapped(texts, Tokenizer.load(model), c)))  # type: ignore[misc]
        tokens = SEQUENCES * SEQ
        fed = {ranks: update_s(first, ranks) for ranks in (1, 8)}
    result = {
        "command": " ".join(["python -m tests.benchmarks.data_path", *sys.argv[1:]]),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "text_mb": round(megabytes, 1),
        "prepare_mb_per_s": round(median(ours), 2),
        "datasets_map_mb_per_s": round(median(theirs), 2),
        "prepare_over_map": [round(a / b, 3) for a, b in zip(ours, theirs, strict=True)],
        "fed_tokens_per_s": round(tokens / fed[1]),
        "share_of_a_step_at_a_million_tokens_per_s": {
            f"{ranks} ranks": round(one / (tokens / 1e6), 5) for ranks, one in fed.items()
        },
    }
    text_out = json.dumps(result, indent=1)
    print(text_out)
    if given.out is not None:
        given.out.write_text(text_out + "\n")


if __name__ == "__main__":
    main()
