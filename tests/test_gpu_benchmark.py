"""The script for the numbers of one GPU takes its way on a CPU, and when the GPU says no."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main as llmtrain
from llmtrain.config_file import load_config
from llmtrain.planner.gpus import GIB, Gpu
from tests import ranks
from tests.benchmarks import gpu

H200 = Gpu("NVIDIA H200", int(139.8 * GIB), None)
H100 = Gpu("NVIDIA H100 80GB HBM3", int(79.1 * GIB), None)
ANSWER = {"step_s": 2.0, "tokens_per_s": 100.0, "mfu": 0.4, "hfu": 0.4, "memory_gib": 90.0, "planned_gib": 100.0}
OURS = {
    **ANSWER,
    "phases_s": {"data": 0.0, "forward": 1.0, "backward": 2.0, "optimizer": 1.0, "log": 0.0, "other": 0.0},
}


def hf_loop(words: list[str]) -> None:
    from tests.benchmarks import gpu_hf

    gpu_hf.main(words)


class Forked:
    """Answers as a process does, from a server that has torch loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counted = itertools.count()

    def __call__(self, words: list[str], limit_s: float) -> gpu.Outcome:
        door = llmtrain if words[0] == "llmtrain" else hf_loop
        started = ranks.start(self.folder / str(next(self.counted)), 1, door, words[1:])
        started.wait(limit_s)
        return gpu.answer(started.text(), started.text())


class Told:
    """Answers as it was told, by the words of a case; otherwise with the same numbers. Keeps what was asked."""

    def __init__(self, **said: list[str]) -> None:
        self.said = said
        self.asked: list[list[str]] = []

    def __call__(self, words: list[str], limit_s: float) -> gpu.Outcome:
        self.asked.append(words)
        engine = next(word.removeprefix("engine.kind=") for word in words if word.startswith("engine.kind="))
        hf = words[0] != "llmtrain"
        said = self.said.get("hf" if hf else engine, [])
        if said and (text := said.pop(0)):
            return gpu.Outcome(None, text)
        return gpu.Outcome({**(ANSWER if hf else OURS), "tokens_per_s": 80.0 if hf else 100.0}, "")


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
    gpu.main(["--cpu", "--rounds", "1", "--out", str(out)], Forked(tmp_path))
    found = json.loads(out.read_text())
    assert found["device"]["name"] == "cpu"
    cases = found["shapes"]["tiny"]["cases"]
    with_hf = importlib.util.find_spec("transformers") is not None
    for engine in ("single", "fsdp"):
        case = cases[engine]
        assert case["measured"] and case["why"] is None, case
        assert (case["micro"], case["recompute"]) == (2, "none")
        assert case["rounds"][0]["engine"]["kind"] == engine and case["rounds"][0]["updates"] == 2
        assert case["step_s"] > 0 and case["tokens_per_s"] > 0 and case["mfu"] > 0
        assert set(case["phases_s"]) == {"data", "forward", "backward", "optimizer", "log", "other"}
        assert case["memory_gib"] > case["planned_gib"] > 0
        assert len(case["ratios_to_hf"]) == with_hf
    assert cases["hf"]["measured"] == with_hf
    assert with_hf or "transformers is missing" in cases["hf"]["why"]
    assert not cases["zero 1"]["measured"] and cases["zero 1"]["bytes_a_parameter"] > 0
    printed = capsys.readouterr()
    assert "tiny single" in printed.out and "WARNING zero 1" in printed.err


@pytest.mark.parametrize("name", gpu.SHAPES)
@pytest.mark.parametrize("engine", gpu.ENGINES)
def test_what_is_asked_of_a_gpu_is_a_whole_model_that_the_plan_says_fits(name: str, engine: str) -> None:
    """On the GPU a config would be refused, or another model measured than the one that is named."""
    shape = gpu.SHAPES[name]
    case = gpu.open_case(load_config(gpu.ROOT / shape.config, list(shape.overrides)), engine, H200, gpu.RECOMPUTE)
    assert case.ladder
    for attempt in case.ladder:
        assert attempt.planned <= H200.usable
        words = gpu.words_of(shape, engine, attempt, 10)
        given = [word for before, word in itertools.pairwise(words) if before == "--set"]
        config = load_config(words[words.index("--config") + 1], given)
        assert (config.model.num_layers, config.batch.seq_len) == {"7b": (32, 2048), "1b": (22, 4096)}[name]
        assert config.engine.compile and config.engine.precision == "bf16"
        assert config.batch.micro == attempt.micro and config.batch.accumulation(1) > 1
    by_choice = [[a.micro for a in case.ladder if a.recompute == choice] for choice in gpu.RECOMPUTE]
    assert [a.micro for a in case.ladder] == [*by_choice[0], *by_choice[1]]
    assert all(micros == sorted(micros, reverse=True) for micros in by_choice)


def test_out_of_memory_goes_on_below_and_a_failure_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU with a little less room than planned, or one engine that breaks, would cost all the numbers."""
    told = Told(single=["torch.OutOfMemoryError: CUDA out of memory", ""], fsdp=["Traceback\nRuntimeError: broken"])
    cases = run(monkeypatch, H200, tmp_path / "out.json", told, "--shapes", "1b")["shapes"]["1b"]["cases"]
    single, fsdp, hf = cases["single"], cases["fsdp"], cases["hf"]
    assert [one["ended"] for one in single["tried"]] == ["out of memory", "measured", "measured"]
    assert [one["micro"] for one in single["tried"]] == [8, 4, 4] and single["micro"] == 4
    assert single["memory_of_plan"] == 0.9 and single["ratios_to_hf"] == [1.25, 1.25]
    assert not fsdp["measured"] and fsdp["why"] == "failed: RuntimeError: broken"
    assert len(hf["rounds"]) == 2 and hf["why"] is None
    doors = [words[0] for words in told.asked]
    assert doors == ["llmtrain"] * 3 + ["tests.benchmarks.gpu_hf"] * 2 + ["llmtrain"], "the second round starts later"


def test_a_model_too_large_is_told_and_never_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a smaller GPU would wait minutes for the model's weights to be drawn, to run out of memory."""
    told = Told()
    found = run(monkeypatch, H100, tmp_path / "out.json", told, "--shapes", "7b")
    assert told.asked == []
    assert "does not fit" in found["shapes"]["7b"]["cases"]["fsdp"]["why"]
    assert "2 GPUs" in found["shapes"]["7b"]["cases"]["fsdp"]["why"]


def test_the_file_keeps_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases measured one by one, because minutes are short, would wipe each other out; two GPUs would be mixed."""
    out = tmp_path / "out.json"
    run(monkeypatch, H200, out, Told(), "--shapes", "7b", "--engines", "single")
    found = run(monkeypatch, H200, out, Told(), "--shapes", "7b", "--engines", "fsdp")
    cases = found["shapes"]["7b"]["cases"]
    assert cases["single"]["measured"] and cases["fsdp"]["measured"]

    def interrupted(words: list[str], limit_s: float) -> gpu.Outcome:
        if "engine.kind=fsdp" in words:
            raise KeyboardInterrupt
        return gpu.Outcome(OURS, "")

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, H200, out, interrupted, "--shapes", "7b")
    cases = json.loads(out.read_text())["shapes"]["7b"]["cases"]
    assert cases["fsdp"]["measured"], "its turn had not come"
    found = run(monkeypatch, H100, out, Told(), "--shapes", "1b", "--engines", "fsdp")
    assert found["device"]["name"] == H100.name and list(found["shapes"]) == ["1b"]


def test_a_process_answers_or_says_why_not() -> None:
    """A case that broke would be told without its reason, or one that hangs would hold the GPU for ever."""
    plan = ["llmtrain", "plan", "--config", str(gpu.ROOT / "configs/7b_cosine.yaml"), "--json"]
    assert (gpu.as_process(plan, 120, "cpu").result or {})["parameters"] == 6_738_415_616
    refused = gpu.as_process([*plan, "--set", "engine.kind=singel"], 120, "cpu")
    assert refused.result is None and not refused.out_of_memory and "singel" in refused.last_line
    assert "no answer in 0 s" in gpu.as_process(plan, 0.01, "cpu").said
