"""The planner's times against what was measured on a GPU, and the choices it makes from them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.engines.fp8 import described
from llmtrain.planner import speed
from llmtrain.planner.gpus import GPUS, Gpu, find_gpu
from llmtrain.planner.memory import memory
from tests.ledger import run_config

CONFIGS = Path(__file__).parent.parent / "configs"
H200 = GPUS["h200"]
UPDATE = 65536  # tokens
WITHIN = 0.03

# (preset, sequence, micro-batch, engine, seconds an update): one NVIDIA H200, torch 2.11, random tokens.
MEASURED: list[tuple[str, int, int, dict[str, Any], float]] = [
    ("1b", 4096, 8, {"compile": True}, 0.941),
    ("1b", 4096, 8, {"compile": True, "kind": "fsdp"}, 0.958),
    ("1b", 4096, 8, {"compile": True, "kind": "deepspeed", "zero_stage": 1}, 0.949),
    ("1b", 4096, 8, {"compile": True, "fp8": "rowwise"}, 0.966),
    ("1b", 4096, 4, {}, 1.100),
    ("llama-7b", 2048, 8, {"compile": True, "activation_checkpointing": "all"}, 6.096),
    ("llama-7b", 2048, 1, {"compile": True}, 5.490),
    ("llama-7b", 2048, 2, {"compile": True, "kind": "fsdp", "activation_checkpointing": 4}, 6.150),
]
# The same with products that add to fp32 sums.
MEASURED_SUMMING: list[tuple[str, int, int, dict[str, Any], float]] = [
    ("1b", 4096, 8, {"compile": True}, 0.9475),
    ("1b", 4096, 8, {"compile": True}, 0.9328),
    ("llama-7b", 2048, 2, {"compile": True, "activation_checkpointing": "all"}, 6.300),
    ("llama-7b", 2048, 2, {"compile": True}, 4.7807),
]


def run_of(preset: str, seq_len: int, micro: int, **engine: Any) -> Config:
    """A run with updates of 65,536 tokens on one GPU."""
    model = {"preset": preset, "max_seq_len": seq_len}
    batch = {"global_sequences": UPDATE // seq_len, "micro": micro, "seq_len": seq_len}
    return run_config(preset, {"kind": "single", **engine}, 1, micro, seq_len, model=model, batch=batch)


def seconds(config: Config, gpu: Gpu = H200, ranks: int = 1) -> float:
    found = speed.expected(config, ranks, gpu)
    assert found is not None
    return found.step_seconds


@pytest.mark.parametrize(("preset", "seq_len", "micro", "engine", "measured"), MEASURED)
def test_updates_take_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, preset: str, seq_len: int, micro: int, engine: dict[str, Any], measured: float
) -> None:
    """A choice would be recommended on times that no GPU takes."""
    monkeypatch.setattr(speed, "sums_gradients_in_products", lambda config: False)
    assert seconds(run_of(preset, seq_len, micro, **engine)) == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize(("preset", "seq_len", "micro", "engine", "measured"), MEASURED_SUMMING)
def test_updates_that_sum_in_products_take_what_was_measured(
    preset: str, seq_len: int, micro: int, engine: dict[str, Any], measured: float
) -> None:
    """What `single` does by default would be planned slower or faster than it is."""
    config = run_of(preset, seq_len, micro, **engine)
    assert speed.sums_gradients_in_products(config)
    assert seconds(config) == pytest.approx(measured, rel=WITHIN)


def test_one_layers_attention_takes_what_was_measured() -> None:
    """Long sequences would be planned at the speed of short ones, or small heads at that of large ones."""
    layers = {("1b", 4096): 2.55, ("llama-7b", 2048): 2.17, ("llama3-8b", 8192): 6.96}  # ms, 16,384 tokens
    for (preset, seq_len), milliseconds in layers.items():
        config = run_of(preset, seq_len, 1)
        parts = speed.update_seconds(config, 1, H200)
        assert parts is not None
        one = parts.attention / config.model.num_layers / (UPDATE / 16384)
        assert 1e3 * one == pytest.approx(milliseconds, rel=WITHIN)


def test_costs_are_ordered_as_the_work_is() -> None:
    """A plan would recommend more work for the same update."""
    choices = ["none", "cheap", 4, 2, "all"]
    for compiled in (True, False):
        by_choice = [
            seconds(run_of("llama-7b", 2048, 2, compile=compiled, activation_checkpointing=one)) for one in choices
        ]
        assert by_choice[0] == min(by_choice) and by_choice[2:] == sorted(by_choice[2:])
        assert by_choice[0] < by_choice[1] < by_choice[4]
    by_micro = [seconds(run_of("llama-7b", 2048, micro, compile=True)) for micro in (1, 2, 4, 8)]
    assert by_micro == sorted(by_micro, reverse=True)
    plain = seconds(run_of("1b", 4096, 8, compile=True))
    assert plain < seconds(run_of("1b", 4096, 8))
    assert plain < seconds(run_of("1b", 4096, 8, compile=True, deterministic=True))
    slower = [seconds(run_of("1b", 4096, 8, compile=True, precision=one)) for one in ("tf32", "fp32")]
    assert plain < slower[0] < slower[1]
    sharded, whole = (
        run_of("llama-7b", 2048, 1, compile=True, **engine)
        for engine in ({"kind": "fsdp"}, {"kind": "deepspeed", "zero_stage": 0})
    )
    assert 8 * seconds(sharded, ranks=8) == pytest.approx(seconds(sharded))
    assert 8 * seconds(whole, ranks=8) > seconds(whole)  # every rank updates all of it


def test_the_parts_add_up_to_the_update() -> None:
    """A reader of the JSON would look for time that is in no part, or in two."""
    found = speed.expected(run_of("1b", 4096, 8, compile=True, fp8="rowwise"), 1, H200)
    assert found is not None and all(part > 0 for part in asdict(found.parts).values())
    assert found.step_seconds == pytest.approx(sum(asdict(found.parts).values()))
    assert found.tokens_per_second == pytest.approx(UPDATE / found.step_seconds)


def test_the_fastest_choice_that_fits_is_found() -> None:
    """A GPU of 139 GiB would recompute, or run micro-batches of one, for memory that it has."""
    large = speed.recommended(run_of("llama-7b", 2048, 4, compile=True, activation_checkpointing="all"), 1, H200)
    assert large is not None and (large.micro, large.activation_checkpointing) == (2, "none")
    assert large.overrides == ["batch.micro=2", "engine.activation_checkpointing=none"]
    after = run_of("llama-7b", 2048, 2, compile=True)
    assert large.total == memory(after, 1).total <= H200.usable
    assert large.speed == speed.expected(after, 1, H200)
    again = speed.recommended(after, 1, H200)
    assert again is not None and again.overrides == []
    small = speed.recommended(run_of("1b", 4096, 4, compile=True), 1, H200)
    assert small is not None and small.micro >= 8 and small.activation_checkpointing == "none"


def test_nothing_that_was_tried_and_fits_is_faster() -> None:
    """A user who tries the choices one by one would find a better one than was recommended."""
    config = run_of("llama3-8b", 8192, 1, compile=True, kind="fsdp")
    batch = config.batch.model_copy(update={"global_sequences": 64})
    config = config.model_copy(update={"batch": batch})
    found = speed.recommended(config, 4, GPUS["h100"])
    assert found is not None and found.total <= GPUS["h100"].usable
    for micro in (1, 2, 4, 8, 16):
        for choice in speed.RECOMPUTED:
            tried = speed.changed(config, {"activation_checkpointing": choice}, micro)
            if memory(tried, 4).total <= GPUS["h100"].usable:
                assert found.speed.step_seconds <= seconds(tried, GPUS["h100"], 4)


def test_a_share_of_memory_left_to_the_compiler_is_written_out() -> None:
    """The recommended words would leave a setting that the config refuses beside them, or that is not planned."""
    config = run_of("1b", 4096, 4, compile=True, activation_memory=0.5)
    found = speed.recommended(config, 1, H200)
    assert found is not None and "engine.activation_memory=1.0" in found.overrides
    words = ["engine.compile=true", "engine.activation_memory=0.5", "engine.kind=single"]
    load_config(CONFIGS / "1b_cosine.yaml", [*words, *found.overrides])


@pytest.mark.parametrize(
    ("gpu", "engine", "reason"),
    [
        (Gpu("mine", 2**37, None), {}, "the peak of mine in bf16 is not known"),
        (Gpu("mine", 2**37, 1e14), {}, "give --gpu-bandwidth"),
        (Gpu("mine", 2**37, 1e14, None, 1e12), {"precision": "fp32"}, "the peak of mine in fp32 is not known"),
        (H200, {"kind": "deepspeed", "zero_stage": 2, "offload.optimizer": True}, "was not measured"),
    ],
)
def test_no_speed_is_made_up(gpu: Gpu, engine: dict[str, Any], reason: str) -> None:
    """A card would be recommended what suits another one."""
    config = run_of("1b", 4096, 1, **engine) if "offload.optimizer" not in engine else None
    config = config or run_config("1b", engine, 1, 1, 2048)
    assert reason in speed.unknown(config, gpu)
    assert speed.expected(config, 1, gpu) is None and speed.recommended(config, 1, gpu) is None


def test_where_nothing_fits_nothing_is_recommended() -> None:
    """A user would start what the same plan says does not fit."""
    assert speed.recommended(run_of("llama-7b", 2048, 1), 1, GPUS["h100"]) is None


def test_rates_are_those_of_the_precision() -> None:
    """A run in fp32 would be planned at the speed of tensor cores that it does not use."""
    assert [H200.flops(one) for one in ("bf16", "tf32", "fp32")] == [989e12, 494.5e12, 67e12]
    assert all(gpu.fp32_flops and gpu.bandwidth for gpu in GPUS.values())
    other = find_gpu("mine", 80, 300, 2)
    assert (other.flops("tf32"), other.flops("fp32"), other.bandwidth) == (150e12, None, 2e12)
    assert find_gpu("h100", bandwidth_tb=3).bandwidth == 3e12


def test_fp8_is_warned_of_where_it_should_lose() -> None:
    """A user would lose accuracy and time at once."""
    assert speed.fp8_words(run_of("1b", 4096, 8, compile=True), 1, H200) == ""
    for preset, seq_len in (("1b", 4096), ("125m", 2048)):
        words = speed.fp8_words(run_of(preset, seq_len, 8, compile=True, fp8="rowwise"), 1, H200)
        assert "expected to lose" in words and "hidden size 2048 alone" in words and "engine.fp8=none" in words
    large = speed.fp8_words(run_of("llama-7b", 2048, 2, compile=True, fp8="rowwise"), 1, H200)
    assert "shorter here, which is not measured" in large
    assert "lose" in speed.fp8_words(run_of("llama-7b", 2048, 2, fp8="rowwise"), 1, H200)  # not compiled
    assert "refuses engine.fp8" in speed.fp8_words(run_of("1b", 4096, 8, fp8="rowwise"), 1, GPUS["a100"])


def test_the_banner_says_where_fp8_was_measured() -> None:
    """A user would take fp8 for faster, since that is what it is for."""
    config = run_of("1b", 4096, 8, compile=True, fp8="rowwise")
    assert "measured slower than bf16 at hidden size 2048" in described(config, torch.device("cuda", 0))
    assert "measured" not in described(config, torch.device("cpu"))


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints for the 7B config under `single`, compiled, with updates of 65,536 tokens."""
    sets = ["engine.kind=single", "engine.compile=true", "batch.global_tokens=64K"]
    flags = [word for one in sets for word in ("--set", one)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(CONFIGS / "7b_cosine.yaml"), *flags, *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_command_recommends(capsys: pytest.CaptureFixture[str]) -> None:
    """A user would have to try micro-batches and recomputation on the GPU to find the fastest."""
    choice = ["--set", "batch.micro=2", "--set", "engine.activation_checkpointing=none"]
    printed = answer(capsys, "--gpu", "h200")
    assert f"on an h200: {' '.join(choice)}: 4.86 s an update, 13,497 tokens/s, MFU 58.5%" in printed
    assert "as configured 6.05 s" in printed
    assert "on an h200: as configured: 4.86 s" in answer(capsys, "--gpu", "h200", *choice)
    found = json.loads(answer(capsys, "--gpu", "h200", "--json"))
    assert found["recommended"]["overrides"] == choice[1::2]
    assert found["recommended"]["speed"]["step_seconds"] < found["expected"]["step_seconds"]
    card = ["--gpu-memory", "139", "--gpu-peak", "989"]
    assert "no choice to recommend: the memory bandwidth of 139 GiB GPU" in answer(capsys, *card)
    assert f"{' '.join(choice)}: 4.86 s" in answer(capsys, *card, "--gpu-bandwidth", "4.8")
    assert "no choice to recommend: nothing fits with this layout" in answer(capsys, "--gpu", "h100")
