"""A small prepared data folder, a small config, and ranks to train on, shared by the tests."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from llmtrain.cli import main
from tests import ranks

pytest_plugins = ["tests.slurm_cluster"]


def text_folder(folder: Path) -> Path:
    """Forty small documents of real code, the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [line for line in (Path(__file__).parent / "conftest.py").read_text().splitlines() if line.strip()]
    for document in range(40):
        lines = [words[(document * 7 + line * (document % 5 + 1)) % len(words)] for line in range(30)]
        (folder / f"{document:02d}.txt").write_text("\n".join(lines) + f"\nend of {document}\n")
    return folder


def small_config(data: Path, text: Path) -> dict[str, Any]:
    """A run that takes a second: two layers, odd sizes, grouped heads, 20 updates."""
    return {
        "run": {"name": "small", "seed": 7},
        "model": {
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 100,
            "vocab_size": 400,
            "max_seq_len": 64,
        },
        "data": {
            "path": str(data),
            "source": {"kind": "text", "paths": [str(text)]},
            "tokenizer": {"kind": "sentencepiece", "vocab_size": 350, "sample_bytes": 1_000_000},
            "validation_fraction": 0.15,
            "shard_bytes": 20_000,
        },
        "batch": {"global_sequences": 8, "micro": 2, "seq_len": 32},
        "schedule": {"name": "cosine", "peak": 0.01, "warmup": "4 steps", "horizon": "20 steps", "floor": 0.1},
        "validation": {"max_tokens": 200},
        "engine": {"kind": "single", "precision": "fp32", "timeout_s": 60},
    }


@pytest.fixture(autouse=True)
def as_torch_starts() -> None:
    """Engines set torch's arithmetic for the whole process; a test begins without what an earlier one set."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "use_deterministic_algorithms"):
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small config, its data prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    config = small_config(folder / "data", text_folder(folder / "text"))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--config", str(path), "--workers", "1"])
    assert ended.value.code == 0
    return config


@pytest.fixture
def leg(prepared: dict[str, Any], tmp_path: Path) -> Callable[..., ranks.Ranks]:
    """Start one leg of a run in `tmp_path/NAME` on so many ranks, with overrides; returns its processes."""

    def start(name: str, count: int, *overrides: str, arguments: tuple[str, ...] = ()) -> ranks.Ranks:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(prepared))
        words = ["train", "--config", str(path), "--set", f"run.dir={tmp_path / name}"]
        for override in overrides:
            words += ["--set", override]
        output = tmp_path / "logs" / f"{name}_{len(list((tmp_path / 'logs').glob(name + '_*')))}"
        return ranks.start(output, count, main, [*words, *arguments])

    return start
