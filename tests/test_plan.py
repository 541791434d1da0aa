"""The planner's arithmetic against every live tensor of real engines, and what the command answers."""

import gc
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain.cli import main
from llmtrain.config_file import load_config
from llmtrain.data.batches import Batch
from llmtrain.distributed import World, find_place, open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import parameter_groups
from llmtrain.model import loss, precision
from llmtrain.model.decoder import Decoder
from llmtrain.model.loss import chunk_tokens
from llmtrain.planner import activations, fit, state
from llmtrain.planner.gpus import GPUS, find_gpu
from llmtrain.planner.memory import memory
from llmtrain.planner.plan import make_plan, misfit
from llmtrain.train.run import _too_large
from llmtrain.train.throughput import PEAK_BF16_FLOPS
from tests import ranks
from tests.hollow import Hollow, alone
from tests.ledger import LAYOUTS, Constant, Ledger, kept_for_backward, measured, planned, run_config

CONFIGS = Path(__file__).parent.parent / "configs"
MICRO, SEQ_LEN = 2, 260  # two chunks of logits for `tiny` on a CPU


def measure_layouts(names: list[str], preset: str, count: int, output: Path) -> None:
    """On every rank, an update of each layout under the ledger; writes what it held, as {layout: {what: bytes}}."""
    found = {}
    with open_world(120, collectives=True) as world:
        for name in names:
            found[name] = measured(run_config(preset, LAYOUTS[name], count, MICRO, SEQ_LEN), world)
            gc.collect()
        (output / f"{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        (1, ["single fp32", "single bf16", "single, averaged bf16", "zero 2 bf16"]),
        (
            2,
            [
                "fsdp fp32",
                "fsdp, freed fp32",
                "fsdp, reduced last bf16",
                "zero 0 bf16",
                "zero 1 fp32",
                "zero 3 fp32",
                "zero 2, optimizer on the host bf16",
            ],
        ),
        (3, ["fsdp bf16", "zero 1 bf16", "zero 2 fp32", "zero 3, averaged bf16"]),
    ],
)
def test_what_engines_hold_is_what_was_planned(tmp_path: Path, count: int, chosen: list[str]) -> None:
    """A run would be sent to a cluster on numbers of the planner's own invention."""
    ranks.start(tmp_path / "logs", count, measure_layouts, chosen, "tiny", count, tmp_path).succeeded()
    on_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    for name in chosen:
        config = run_config("tiny", LAYOUTS[name], count, MICRO, SEQ_LEN)
        for what, bytes_planned in planned(config, count).items():
            held = max(found[name][what] for found in on_ranks)
            # A CPU makes fp32 copies of bf16 operands, which no GPU does.
            if what != "peak" or config.engine.precision == "fp32":
                assert held == pytest.approx(bytes_planned, rel=0.05), (name, what)


def test_an_engine_without_memory_holds_what_it_holds_with_it(tmp_path: Path) -> None:
    """What is committed as measured of large models would be measured of something else."""
    for way in ("real", "hollow"):
        ranks.start(tmp_path / way, 2, measure_one_way, way, "zero 3 bf16", tmp_path).succeeded()
    for rank in range(2):
        real, hollow = (json.loads((tmp_path / f"{way}_{rank}.json").read_text()) for way in ("real", "hollow"))
        # When gloo's threads free what they hold is by chance, and a scalar of theirs may be in the peak.
        assert real.pop("peak") == pytest.approx(hollow.pop("peak"), rel=1e-6)
        assert real == hollow


def measure_one_way(way: str, name: str, output: Path) -> None:
    """On every rank, a layout of `tiny` with its memory and the other ranks, or without."""
    config, place = run_config("tiny", LAYOUTS[name], 2, MICRO, 64), find_place(os.environ)
    if way == "hollow":
        with alone(place.rank, place.size) as world, Hollow():
            found = measured(config, world)
    else:
        with open_world(120, collectives=True) as world:
            found = measured(config, world)
    (output / f"{way}_{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("compute", ["fp32", "bf16", "autocast"])
def test_logits_are_held_as_planned(monkeypatch: pytest.MonkeyPatch, compute: str, tokens: int) -> None:
    """A GPU would hold a chunk of logits more than its plan, which is GiBs with a large vocabulary."""
    monkeypatch.setattr(loss, "chunk_tokens", lambda *found: min(found[0], 64))
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", True)
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    if compute != "fp32":  # on a GPU the product of rounded matrices is never rounded
        monkeypatch.setattr(loss, "_product", lambda a, b: a.float() @ b.float())
    head = loss.Head(32, 1000).to(dtype)
    hidden = torch.zeros((1, tokens, 32), dtype=dtype, requires_grad=True)
    targets = torch.zeros((1, tokens), dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"), Ledger((64, 1000)) as ledger:
        head(hidden, targets)
    c = 4 if compute == "fp32" else 2
    assert ledger.wide_peak == activations.logits_bytes(64, 1000, c)


def test_chunks_and_groups_are_those_of_the_engines() -> None:
    """A change of the head or of the optimizer's groups would leave the planner behind."""
    for device in ("cpu", "cuda"):
        for tokens, vocab in ((1, 400), (640, 4096), (8192, 32000), (65536, 128256)):
            assert activations.chunk_tokens(tokens, vocab, device) == chunk_tokens(tokens, vocab, device)
    for factors in ({}, {"lr_factors": {"head": 0.5}, "decay_embeddings": True}):
        config = run_config("tiny", {"kind": "single"}, 1, MICRO, SEQ_LEN, optim=factors)
        with torch.device("meta"):
            named = Decoder(config.model).named_parameters()
        real = [sum(p.numel() for p in group["params"]) for group in parameter_groups(named, config.optim)]
        assert [sum(group.values()) for group in state._groups(config)] == [count for count in real if count]


@pytest.mark.parametrize("choice", ["none", 2, "all"])
def test_what_blocks_keep_is_what_was_planned(choice: str | int) -> None:
    """The largest micro-batch said to fit would run out of memory, or a GPU would stay half empty."""
    engine = {"kind": "single", "precision": "fp32", "activation_checkpointing": choice}
    kept, bytes_planned = kept_for_backward(run_config("tiny", engine, 1, MICRO, SEQ_LEN))
    assert abs(kept - bytes_planned) <= 0.05 * bytes_planned


def test_where_llama_7b_fits() -> None:
    """Days of a cluster would be asked for a run that dies at its first update."""
    config = load_config(CONFIGS / "7b_cosine.yaml")
    found = {}
    for name in ("h100", "h200"):
        on_one = make_plan(config, 1, find_gpu(name))
        found[name] = {layout.name: layout.fewest_ranks for layout in on_one.layouts}
    assert [found["h200"][name] for name in ("single", "fsdp", "zero 2", "zero 3")] == [1, 1, 1, 1]
    assert [found["h100"][name] for name in ("single", "fsdp", "zero 1", "zero 2", "zero 3")] == [None, 2, 4, 2, 2]
    per_parameter = {"fsdp": 16, "zero 1": 20, "zero 2": 18, "zero 3": 18, "single": 18}
    for name, count in per_parameter.items():
        held = state.holdings(fit.changed(config, fit.LAYOUTS[name]), 1)
        kinds = ("weights", "masters", "moments", "gradients")
        total = sum(held.always.get(kind, 0) + held.update.get(kind, 0) for kind in kinds)
        flattened = held.update["gradients"] if name == "zero 3" else 0  # a group at a time
        assert (total - flattened) / on_one.parameters == pytest.approx(count, rel=0.001), name


def test_every_change_offered_fits_and_the_cheapest_comes_first() -> None:
    """A user would follow the advice and run out of memory again."""
    config = load_config(CONFIGS / "7b_cosine.yaml", ["batch.micro=32", "engine.activation_checkpointing=none"])
    gpu = find_gpu("h100")
    made = make_plan(config, 8, gpu)
    assert not made.fits and made.changes
    assert made.changes[0].overrides == ["batch.micro=4"]
    for change in made.changes:
        after = load_config(
            CONFIGS / "7b_cosine.yaml",
            ["batch.micro=32", "engine.activation_checkpointing=none", *change.overrides],
        )
        assert memory(after, change.ranks).total == change.total <= gpu.usable
    assert "micro-batches of 4" in (misfit(config, 8, gpu.memory) or "")
    assert misfit(config, 8, 10**12) is None


def test_checkpoints_and_time_add_up() -> None:
    """A disk would fill, or a job end, before the date that was planned."""
    overrides = ["checkpoint.every=100 steps", "checkpoint.keep_every=1000 steps", "schedule.horizon=5000 steps"]
    config = load_config(CONFIGS / "7b_cosine.yaml", overrides)
    made = make_plan(config, 8, find_gpu("h100"), mfu=0.5, bandwidth=2e9)
    assert made.disk.checkpoint == 12 * made.parameters
    assert made.disk.kept == 3 + 4  # the newest three, and 1000 to 4000
    assert made.disk.seconds == made.disk.checkpoint / 2e9
    assert made.pace is not None
    assert made.pace.step_seconds == pytest.approx(4 * 2**20 * made.flops_per_token / (8 * 0.5 * 989e12))
    assert made.pace.days == pytest.approx(5000 * made.pace.step_seconds / 86400)


def test_gpus_are_as_fast_as_training_says() -> None:
    """A plan and a run would disagree on what the MFU is a part of."""
    assert {gpu.bf16_flops for gpu in GPUS.values() if gpu.name[0] in "hb" or "a100" in gpu.name} == set(
        PEAK_BF16_FLOPS.values()
    )


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What the command says of the 7B config, as JSON."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(CONFIGS / "7b_cosine.yaml"), "--gpus", "8", "--json", *words])
    assert ended.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_any_card_is_planned_by_memory_and_peak(capsys: pytest.CaptureFixture[str]) -> None:
    """Who owns a card that is not listed would get no plan, or that of another card."""
    peak = {"bf16_flops": 165.2e12}
    card = plan_of(capsys, "--gpu", "rtx4090", "--gpu-memory", "23.5", "--gpu-peak", "165.2")
    assert card["gpu"].items() >= {"name": "rtx4090", "memory": int(23.5 * 2**30), **peak}.items()
    assert card["pace"]["mfu"] == pytest.approx(0.4)
    assert card["pace"]["tokens_per_second"] == pytest.approx(8 * 0.4 * 165.2e12 / card["flops_per_token"])
    known = plan_of(capsys, "--gpu", "h100", "--gpu-peak", "165.2")
    assert known["gpu"].items() >= {"name": "h100", "memory": 79 * 2**30, **peak}.items()


def test_no_rate_is_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    """A card would be planned at the speed of another one."""
    for words, name in ((["--gpu-memory", "64"], "64 GiB GPU"), (["--gpu", "mine", "--gpu-memory", "64"], "mine")):
        card = plan_of(capsys, *words)
        assert card["gpu"].items() >= {"name": name, "memory": 64 * 2**30, "bf16_flops": None}.items()
        assert card["pace"] is None
        paced = plan_of(capsys, *words, "--tokens-per-second", "1000")["pace"]
        assert (paced["tokens_per_second"], paced["mfu"]) == (8000, None)
    assert plan_of(capsys)["gpu"]["name"] == "h100"
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(CONFIGS / "7b_cosine.yaml"), "--gpus", "8", "--gpu-memory", "64"])
    assert "no time: the peak of 64 GiB GPU in bf16 is not known; give --gpu-peak" in capsys.readouterr().out


def test_the_advice_for_an_unknown_card_works(capsys: pytest.CaptureFixture[str]) -> None:
    """A user would follow an error's advice and get the same error."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(CONFIGS / "7b_cosine.yaml"), "--gpu", "rtx4090"])
    assert ended.value.code == 2
    advice = " ".join(capsys.readouterr().err.split())
    assert "--gpu-memory in GiB" in advice
    offered = {"--gpu-peak": "165", "--tokens-per-second": "1000"}
    for flag, value in offered.items():
        assert flag in advice
        assert plan_of(capsys, "--gpu", "rtx4090", "--gpu-memory", "24", flag, value)["pace"] is not None


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--gpu", "h10O"], 'did you mean "h100"?'),
        (["--gpu-peak", "100"], "--gpu-peak is that of which card? Give its --gpu-memory in GiB too"),
        (["--gpu-bandwidth", "2"], "--gpu-bandwidth is that of which card? Give its --gpu-memory in GiB too"),
        (["--gpu-bandwidth", "-1"], "--gpu-bandwidth -1.0 must be a number above 0"),
        (["--gpu-memory", "nan"], "--gpu-memory nan must be a number above 0"),
        (["--gpu-peak", "0"], "--gpu-peak 0.0 must be a number above 0"),
        (["--gpu-memory", "64", "--mfu", "0.5"], "that of 64 GiB GPU is not known in bf16: give --gpu-peak"),
        (["--gpus", "7"], "do not divide into micro-batches of 4 on 7 ranks"),
        (["--gpus", "2", "--set", "engine.kind=single"], 'engine.kind "single" runs on one rank'),
        (["--gpus", "8", "--set", "engine.kind=fsdp", "--set", "engine.shard_ranks=3"], "does not divide the 8 ranks"),
        (["--measured", "no/such"], "cannot read no/such"),
    ],
)
def test_mistakes_are_named(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A typing mistake would end in a traceback, or in a plan for something else."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(CONFIGS / "7b_cosine.yaml"), *words])
    assert ended.value.code == 2
    assert wanted in capsys.readouterr().err


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script could not read the plan, or a person."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"mfu": mfu}) + "\n" for mfu in (None, 0.3, 0.5, 0.31)))
    words = ["plan", "--config", str(CONFIGS / "7b_cosine.yaml"), "--gpus", "8", "--measured", str(tmp_path)]
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, *extra])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        if not extra:
            assert "FITS" in printed and "moments" in printed and "MFU 31.0%" in printed
    plan = json.loads(printed)
    assert plan["memory"]["total"] == sum(plan["memory"]["kinds"].values()) <= plan["gpu"]["usable"]
    assert plan["memory"]["total"] == max(plan["memory"]["moments"].values())


def test_training_warns_before_it_builds_what_no_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would wait for the model to be built, and for the first update, to see it run out of memory."""
    config = load_config(CONFIGS / "7b_cosine.yaml")
    for gib, warned in ((79, 1), (139, 0)):
        device = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda asked, found=device: found)
        assert len(_too_large(config, World(0, 1, 0, torch.device("cuda", 0)))) == warned
    assert _too_large(config, World(0, 1, 0, torch.device("cpu"))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with what CUDA allocated")
@pytest.mark.parametrize("preset", ["125m", "350m"])
def test_the_peak_on_a_gpu_is_what_was_planned(preset: str) -> None:
    """What fits on paper would not fit in memory."""
    config = run_config(preset, {"kind": "single"}, 1, 8, 1024)
    with open_world(60, collectives=False) as world:
        torch.cuda.reset_peak_memory_stats()
        engine = build_engine(config, world)
        engine.load(Constant(), 0)
        tokens = torch.zeros((8, 1024), dtype=torch.long)
        for _ in range(2):
            engine.train_step([Batch(tokens, tokens)] * 2, 1.0)
        peak = torch.cuda.max_memory_allocated()
    assert peak == pytest.approx(memory(config, 1).total, rel=0.15)
