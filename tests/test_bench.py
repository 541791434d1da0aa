"""`llmtrain bench` says how fast a config trains, by the numbers it claims to use."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.cli import main
from llmtrain.config_file import validate
from llmtrain.model.size import flops_per_token, matmul_parameters
from tests import ranks


def run_bench(prepared: dict[str, Any], folder: Path, count: int, *words: str) -> tuple[str, dict[str, Any] | None]:
    """What the first rank prints, and its JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(prepared))
    started = ranks.start(folder / "logs", count, main, ["bench", "--config", str(path), "--steps", "3", *words])
    started.succeeded()
    text = (folder / "logs" / "rank_0.log").read_text()
    found = [line for line in text.splitlines() if line.startswith("{")]
    return text, json.loads(found[-1]) if found else None


def test_the_numbers_of_a_bench_agree_with_each_other(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user would choose hardware by an MFU of another formula, or by a speed of another batch."""
    words = ("--json", "--set", "engine.kind=fsdp", "--set", "engine.activation_checkpointing=2")
    _, result = run_bench(prepared, tmp_path, 2, *words)
    assert result is not None
    config = validate(prepared, "config")
    per_token = flops_per_token(config.model, 32)
    assert result["flops_per_token"] == per_token and result["formula"] == "6 N + 12 L H Q T"
    assert result["updates"] == 3 and result["ranks"] == 2
    assert result["tokens_per_s"] == pytest.approx(config.batch.tokens / result["step_s"], rel=1e-3)
    assert result["tokens_per_s_per_device"] == pytest.approx(result["tokens_per_s"] / 2, rel=1e-3)
    assert result["mfu"] == pytest.approx(
        result["tokens_per_s_per_device"] * per_token / (result["peak_tflops"] * 1e12), rel=0.05, abs=1e-4
    )
    assert "measured here" in result["peak_source"]
    blocks = 2 * (matmul_parameters(config.model) - 400 * 48) + 4 * 2 * 48 * 32
    assert result["hfu"] == pytest.approx(result["mfu"] * (1 + 0.5 * blocks / per_token), rel=0.05, abs=2e-4)
    assert set(result["phases_s"]) == {"data", "forward", "backward", "optimizer", "log", "other"}
    assert all(seconds >= 0 for seconds in result["phases_s"].values())
    assert min(result["communication_s"]["reduce"], result["communication_s"]["gather"]) > 0
    assert set(result["collectives"]) == {"all_reduce_gb_per_s", "all_gather_gb_per_s", "reduce_scatter_gb_per_s"}
    assert 0 < result["planned_gib"] < result["memory_gib"]
    assert result["batches_tokens_per_s"] > 0


def test_a_bench_needs_no_data_and_leaves_nothing_but_its_trace(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user could not measure a machine before the data is there, or would find a run folder he did not start."""
    words = ("--set", f"data.path={tmp_path / 'none'}", "--set", f"run.dir={tmp_path / 'run'}")
    text, _ = run_bench(prepared, tmp_path, 1, *words, "--set", f"run.name=small_{tmp_path.name[:8]}")
    assert "random tokens" in text and "tokens/s" in text and "optimizer" in text
    assert not (tmp_path / "run").exists() and not (tmp_path / "none").exists()


def test_a_profile_is_a_chrome_trace(prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--profile` would leave a file that no viewer opens."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prepared))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--config", str(path), "--steps", "1", "--profile"])
    assert ended.value.code == 0
    names = {event.get("name") for event in json.loads((tmp_path / "small_trace.json").read_text())["traceEvents"]}
    assert "aten::mm" in names
