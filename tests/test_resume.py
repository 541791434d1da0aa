"""An interrupted run is the same run: rows and weights are equal byte for byte to those of the run never stopped."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.train.metrics import read_metrics
from tests.ranks import Ranks

Leg = Callable[..., Ranks]

ENGINES = {
    "single": ("engine.kind=single",),
    "fsdp": ("engine.kind=fsdp",),
    "zero0": ("engine.kind=deepspeed", "engine.zero_stage=0"),
    "zero1": ("engine.kind=deepspeed", "engine.zero_stage=1"),
    "zero2": ("engine.kind=deepspeed", "engine.zero_stage=2"),
    "zero3": ("engine.kind=deepspeed", "engine.zero_stage=3"),
}
MATRIX = [(name, ranks) for name in ENGINES for ranks in (1, 2) if (name, ranks) != ("single", 2)]


def history(run: Path) -> list[str]:
    """The rows of the updates as text, without what depends on the clock."""
    kept = ("kind", "step", "tokens", "loss", "lr", "grad_norm")
    return [json.dumps({key: row[key] for key in kept}) for row in read_metrics(run) if row["kind"] == "step"]


def weights(run: Path, step: int = 20) -> list[bytes]:
    """The bytes of every rank's file: masters and moments."""
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob("rank_*.safetensors"))
    assert files
    return [path.read_bytes() for path in files]


def terminate_after(running: Ranks, run: Path, step: int) -> None:
    """Send SIGTERM to one rank once `step` updates are logged."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(history(run)) >= step:
            os.kill(running.processes[-1].pid, signal.SIGTERM)
            return
        time.sleep(0.005)
    raise AssertionError(running.text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "ranks"), MATRIX)
def test_an_interrupted_run_equals_the_straight_one(
    leg: Leg, tmp_path: Path, engine: str, ranks: int, precision: str
) -> None:
    """A user whose job is split, killed with SIGTERM or resumed five times would get another model."""
    freed = "true" if precision == "bf16" else "null"  # as FSDP2 treats large models, and small ones
    words = (*ENGINES[engine], f"engine.precision={precision}", f"engine.reshard_after_forward={freed}")
    leg("straight", ranks, *words).succeeded()
    expected, final = history(tmp_path / "straight"), weights(tmp_path / "straight")
    assert [json.loads(row)["step"] for row in expected] == list(range(1, 21))

    leg("halves", ranks, *words, "run.stop_at=10 steps").succeeded()
    leg("halves", ranks, *words, arguments=("--resume", "must")).succeeded()
    assert history(tmp_path / "halves") == expected
    assert weights(tmp_path / "halves") == final

    slow = "validation.every=1 steps"
    running = leg("signalled", ranks, *words, slow)
    terminate_after(running, tmp_path / "signalled", 5)
    running.succeeded()
    assert 5 <= len(history(tmp_path / "signalled")) < 20, running.text()
    for stop in (14, 16, 17, 18, 20):
        leg("signalled", ranks, *words, slow, f"run.stop_at={stop} steps", arguments=("--resume", "must")).succeeded()
    assert history(tmp_path / "signalled") == expected
    assert weights(tmp_path / "signalled") == final
