"""The check of one GPU takes its way on a CPU, keeps what it found, and goes on where the GPU says no."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config_file import load_config
from llmtrain.planner.gpus import GIB, Gpu
from tests.benchmarks import gpu, gpu_bench

H200 = Gpu("NVIDIA H200", int(139.8 * GIB), None)
H100 = Gpu("NVIDIA H100 80GB HBM3", int(79.1 * GIB), None)
ROW = {"step_s": 2.0, "tokens_per_s": 100.0, "mfu": 0.4, "memory_gib": 90.0, "planned_gib": 100.0}


class Told:
    """Answers as it was told, by a word of the command; otherwise with the same row. Keeps what was asked."""

    def __init__(self, said: dict[str, list[str]] | None = None) -> None:
        self.said = said or {}
        self.asked: list[list[str]] = []

    def __call__(self, words: list[str], limit_s: float) -> gpu.Outcome:
        self.asked.append(words)
        for word, texts in self.said.items():
            if word in words and texts and (text := texts.pop(0)):
                return gpu.Outcome([], text, False)
        return gpu.Outcome([ROW], "")


def run(monkeypatch: pytest.MonkeyPatch, device: Gpu, out: Path, told: Any, *words: str) -> dict[str, Any]:
    """The file that is written on `device`."""
    monkeypatch.setattr(gpu, "find_device", lambda cpu: (device, {"name": device.name, "memory_gib": 0.0}))
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    gpu.main(["--out", str(out), *words], told)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_path_to_the_numbers_works_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user would lose rented minutes on a GPU to a script that never ran."""
    out = tmp_path / "gpu_cpu.json"
    gpu.main(["--cpu", "--out", str(out)])
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == [part.name for part in gpu.CPU_PARTS]
    with_hf = importlib.util.find_spec("transformers") is not None
    for name, part in parts.items():
        if name == "tiny hf" and not with_hf:
            assert "transformers is missing" in part["why"]
        else:
            assert part["rows"] and "why" not in part, (name, part)
    for name in ("tiny", "tiny deterministic"):
        [row] = parts[name]["rows"]
        assert row["step_s"] > 0 and row["tokens_per_s"] > 0 and row["memory_gib"] > row["planned_gib"] > 0
        assert (row["micro"], row["updates"], row["deterministic"]) == (2, 2, "deterministic" in name)
    assert [row["verified"] for row in parts["verify"]["rows"]] == [True, True], parts["verify"]["rows"]
    assert all(row["same_bits"] for row in parts["attention"]["rows"])
    assert parts["tiny, rank of 8"]["rows"][0]["ranks"] == 8
    assert "tiny deterministic" in capsys.readouterr().out


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part.config], ids=lambda part: part.name)
def test_what_is_asked_of_a_gpu_is_a_whole_model_that_the_plan_says_fits(part: gpu.Part) -> None:
    """On the GPU a config would be refused, or another model measured than the one that is named."""
    asked = gpu.attempts(part, H200)
    assert asked
    for words in asked:
        given = [word for before, word in itertools.pairwise(words) if before == "--set"]
        config = load_config(words[words.index("--config") + 1], given)
        layers, seq_len = {"7b": (32, 2048), "1b": (22, 4096)}[part.name.split()[0]]
        assert (config.model.num_layers, config.batch.seq_len) == (layers, seq_len)
        assert config.engine.compile and config.engine.precision == "bf16"
        assert config.batch.accumulation(1) > 1
    if part.name == "7b":
        assert {"engine.activation_checkpointing=none", "batch.micro=2"} <= set(asked[0])


def test_what_does_not_fit_is_tried_smaller_and_what_breaks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad part would cost all those after it."""
    told = Told({"engine.kind=single": ["CUDA out of memory", ""], "pytest": ["boom\n3 failed, 2 passed in 1 s"]})
    found = run(monkeypatch, H200, tmp_path / "out.json", told, "--only", "1b", "tests", "1b fsdp")["parts"]
    assert [one["ended"] for one in found["1b"]["tried"]] == ["out of memory", "ended"]
    assert found["1b"]["rows"] == [ROW]
    assert found["tests"]["why"] and found["tests"]["rows"] == [{"tests": "3 failed, 2 passed in 1 s"}]
    assert found["1b fsdp"]["rows"] == [ROW]
    micros = [[word for word in words if word.startswith("batch.micro=")][-1] for words in told.asked[:2]]
    assert micros[0] != micros[1]


def test_a_model_too_large_is_told_and_never_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a smaller GPU would wait for a model to run out of memory."""
    told = Told()
    found = run(monkeypatch, H100, tmp_path / "out.json", told, "--only", "7b")
    assert told.asked == [] and "does not fit" in found["parts"]["7b"]["why"]


def test_the_file_keeps_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts found out one by one, because minutes are short, would wipe each other out; two GPUs would be mixed."""
    out = tmp_path / "out.json"
    run(monkeypatch, H200, out, Told(), "--only", "7b")

    def interrupted(words: list[str], limit_s: float) -> gpu.Outcome:
        if "pytest" in words:
            raise KeyboardInterrupt
        return gpu.Outcome([ROW], "")

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, H200, out, interrupted, "--only", "1b", "tests")
    assert list(json.loads(out.read_text())["parts"]) == ["7b", "1b"]
    found = run(monkeypatch, H100, out, Told(), "--only", "1b fsdp")
    assert found["device"]["name"] == H100.name and list(found["parts"]) == ["1b fsdp"]


def test_what_there_is_no_time_for_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lease would end in the middle of a part, with nothing to show for it."""
    told = Told()
    found = run(monkeypatch, H200, tmp_path / "out.json", told, "--minutes", "1", "--only", "7b", "1b")
    assert list(found["parts"]) == ["1b"] and len(told.asked) == 1
    assert "7b: left out" in capsys.readouterr().err


def test_a_process_answers_or_says_why_not() -> None:
    """A part that broke would be told without its reason, or one that hangs would hold the GPU for ever."""
    plan = ["llmtrain", "plan", "--config", str(gpu.ROOT / "configs/7b_cosine.yaml"), "--json"]
    assert gpu.as_process(plan, 120, "cpu").rows[0]["parameters"] == 6_738_415_616
    refused = gpu.as_process([*plan, "--set", "engine.kind=singel"], 120, "cpu")
    assert not refused.rows and not refused.ended_well and "singel" in refused.last_line
    assert "no answer in 0 s" in gpu.as_process(plan, 0.01, "cpu").said


def test_kernels_are_counted_by_what_they_do(tmp_path: Path) -> None:
    """The table would say that a GPU is busy with something else than it is."""
    events = [
        {"cat": "kernel", "ts": 0, "dur": 60, "name": "nvjet_tst_128x256"},
        {"cat": "kernel", "ts": 50, "dur": 30, "name": "cudnn_generated_fort_native_sdpa_sm90_flash_bprop"},
        {"cat": "kernel", "ts": 90, "dur": 10, "name": "triton_poi_fused_silu"},
        {"cat": "cpu_op", "ts": 0, "dur": 500, "name": "aten::mm"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = gpu_bench.kernels(path)
    assert found["ms_of_two_updates"] == {"products": 0.06, "attention": 0.03, "fused pointwise": 0.01}
    assert found["busy"] == 0.9
