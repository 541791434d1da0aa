"""The planner's arithmetic against every live tensor of real engines, and what the command answers."""

import gc
import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import load_config, validate
from llmtrain.data.batches import Batch
from llmtrain.distributed import World, open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import parameter_groups
from llmtrain.model.decoder import Decoder
from llmtrain.model.loss import chunk_tokens
from llmtrain.planner import activations, fit, state
from llmtrain.planner.gpus import GPUS, find_gpu
from llmtrain.planner.memory import memory
from llmtrain.planner.plan import make_plan, misfit
from llmtrain.train.run import _too_large
from llmtrain.train.throughput import PEAK_BF16_FLOPS
from tests import ranks

CONFIGS = Path(__file__).parent.parent / "configs"
MICRO, SEQ_LEN, ACCUMULATION = 2, 260, 2  # two chunks of logits for `tiny` on a CPU
LAYOUTS: dict[str, dict[str, Any]] = {
    f"{name} {precision}": {**engine, "precision": precision}
    for name, engine in fit.LAYOUTS.items()
    for precision in ("fp32", "bf16")
    if not ("host" in name and precision == "fp32")
}


def run_config(preset: str, engine: dict[str, Any], count: int, **changes: Any) -> Config:
    """A run of `preset` with two micro-batches a rank; `offload.optimizer` in `engine` is one of the section below."""
    engine = {key: value for key, value in engine.items() if value is not None}
    offload = {key.partition(".")[2]: engine.pop(key) for key in list(engine) if "." in key}
    values = {
        "run": {"name": "planned"},
        "model": {"preset": preset},
        "data": {"path": "data/none", "tokenizer": {"kind": "sentencepiece", "vocab_size": 300}},
        "batch": {"global_sequences": MICRO * ACCUMULATION * count, "micro": MICRO, "seq_len": SEQ_LEN},
        "schedule": {"name": "cosine", "peak": 1e-3, "horizon": "20 steps"},
        "engine": {**engine, "offload": offload},
        **changes,
    }
    return validate(values, "config")


class Ledger(TorchDispatchMode):
    """Keeps account of every live tensor storage: what there is, what is made, resized and freed inside the block."""

    def __init__(self, wide: tuple[int, int]) -> None:
        super().__init__()
        self.wide = wide  # the shape whose bytes are summed apart: a chunk of logits
        self.held: dict[int, int] = {}
        self.wide_held: dict[int, int] = {}
        self.now = self.peak = self.wide_peak = 0

    def __enter__(self) -> "Ledger":
        self._resize = torch.UntypedStorage.resize_
        ledger = self

        def resize_(storage: Any, size: int) -> Any:
            done = ledger._resize(storage, size)
            if storage._cdata in ledger.held:
                ledger._count(storage._cdata, storage.nbytes())
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        for found in [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]:
            self._note(found)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *ended: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*ended)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return made

    def _note(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            weakref.finalize(storage, self._forget, key)
            if tuple(tensor.shape) == self.wide:
                self.wide_held[key] = storage.nbytes()
                self.wide_peak = max(self.wide_peak, sum(self.wide_held.values()))
        self._count(key, storage.nbytes())

    def _count(self, key: int, size: int) -> None:
        self.now += size - self.held.get(key, 0)
        self.held[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)
        self.wide_held.pop(key, None)


class Constant:
    """Every element of every weight and moment the same."""

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start,), 0.01)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each storage below the tensors."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local if t.device.type != "meta"}


def owned(engine: Any) -> dict[str, int]:
    """Bytes by kind, found through what modules, optimizers and DeepSpeed's attributes refer to; each storage once."""
    zero = getattr(getattr(engine, "engine", None), "optimizer", None)
    module = engine.engine.module if hasattr(engine, "engine") else engine.model
    parameters = list(module.parameters())
    grouped = [p for group in engine.optimizer.param_groups for p in group["params"]]
    masters = next(
        (
            getattr(zero, name)
            for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
            if hasattr(zero, name)
        ),
        grouped,
    )
    buckets = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    found = {
        "bucket": storages(t for buffer in buckets for t in (buffer if isinstance(buffer, list) else [buffer])),
        "weights": storages([*parameters, *(getattr(p, "ds_tensor", None) for p in parameters)]),
        "masters": storages(masters),
        "moments": storages(
            t for s in engine.optimizer.state.values() for k, t in s.items() if k.startswith("exp_avg")
        ),
        "gradients": storages(
            [
                *(p.grad for p in [*parameters, *masters]),
                *(getattr(p, "grad_accum", None) for p in parameters),
                *getattr(zero, "fp32_groups_gradients_flat", []),
                *(t for parts in getattr(zero, "averaged_gradients", {}).values() for t in parts or []),
                *getattr(zero, "accumulated_grads_in_cpu", {}).values(),
                getattr(zero, "grad_partitions_flat_buffer", None),
            ]
        ),
    }
    seen: set[int] = set()
    totals = {}
    for kind, sizes in found.items():
        totals[kind] = sum(size for key, size in sizes.items() if key not in seen)
        seen |= set(sizes)
    return totals


def measure_layouts(names: list[str], preset: str, count: int, output: Path) -> None:
    """On every rank, an update of each layout under the ledger; writes what it held, as {layout: {what: bytes}}."""
    found = {}
    with open_world(120, collectives=True) as world:
        for name in names:
            found[name] = measured(run_config(preset, LAYOUTS[name], count), world)
            gc.collect()
        (output / f"{world.rank}.json").write_text(json.dumps(found))


def measured(config: Config, world: World) -> dict[str, int]:
    """What the second update of a run holds before it, when the weights change, and at most."""
    engine: Any = build_engine(config, world)
    engine.load(Constant(), 0)
    short, whole = (Batch(*torch.ones((2, MICRO, length), dtype=torch.long)) for length in (4, SEQ_LEN))
    engine.train_step([short] * ACCUMULATION, 1.0)
    gc.collect()
    before = {f"always {kind}": count for kind, count in owned(engine).items()}
    chunk = chunk_tokens(MICRO * SEQ_LEN, config.model.vocab_size, "cpu")
    step, update = engine.optimizer.step, {}

    def counted(*arguments: Any, **options: Any) -> Any:
        if not update:
            update.update({f"update {kind}": count for kind, count in owned(engine).items()})
        return step(*arguments, **options)

    engine.optimizer.step = counted
    with Ledger((chunk, config.model.vocab_size)) as ledger:
        elsewhere = ledger.now - sum(before.values())
        engine.train_step([whole] * ACCUMULATION, 1.0)
    engine.optimizer.step = step
    return {**before, **update, "logits": ledger.wide_peak, "peak": ledger.peak, "elsewhere": elsewhere}


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        (1, ["single fp32", "single bf16", "zero 2 bf16"]),
        (2, ["fsdp fp32", "zero 0 bf16", "zero 1 fp32", "zero 3 fp32", "zero 2, optimizer on the host bf16"]),
        (3, ["fsdp bf16", "zero 1 bf16", "zero 2 fp32", "zero 3 bf16"]),
    ],
)
def test_what_engines_hold_is_what_was_planned(tmp_path: Path, count: int, chosen: list[str]) -> None:
    """A run would be sent to a cluster on numbers of the planner's own invention."""
    ranks.start(tmp_path / "logs", count, measure_layouts, chosen, "tiny", count, tmp_path).succeeded()
    on_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    for name in chosen:
        config = run_config("tiny", LAYOUTS[name], count)
        held = {what: max(found[name][what] for found in on_ranks) for what in on_ranks[0][name]}
        planned = state.holdings(config, count)
        for kind in ("weights", "masters", "moments", "gradients"):
            always = planned.always.get(kind, 0) + planned.host.get(kind, 0)
            assert held[f"always {kind}"] == pytest.approx(always, rel=0.05), (name, kind)
            if kind != "weights":  # ZeRO-3 lets go of gathered weights while it updates
                updating = always + planned.update.get(kind, 0)
                assert held[f"update {kind}"] == pytest.approx(updating, rel=0.05), (name, kind)
        logits = activations.micro_batch(config, "cpu").forward["logits"]
        assert held["logits"] == pytest.approx(logits, rel=0.05), name
        if config.engine.precision == "fp32":  # a CPU makes fp32 copies of bf16 operands, which no GPU does
            assert held["peak"] - held["elsewhere"] == pytest.approx(memory(config, count, "cpu").total, rel=0.05), name


def test_chunks_and_groups_are_those_of_the_engines() -> None:
    """A change of the head or of the optimizer's groups would leave the planner behind."""
    for device in ("cpu", "cuda"):
        for tokens, vocab in ((1, 400), (640, 4096), (8192, 32000), (65536, 128256)):
            assert activations.chunk_tokens(tokens, vocab, device) == chunk_tokens(tokens, vocab, device)
    for factors in ({}, {"lr_factors": {"head": 0.5}, "decay_embeddings": True}):
        config = run_config("tiny", {"kind": "single"}, 1, optim=factors)
        with torch.device("meta"):
            named = Decoder(config.model).named_parameters()
        real = [sum(p.numel() for p in group["params"]) for group in parameter_groups(named, config.optim)]
        assert [sum(group.values()) for group in state._groups(config)] == [count for count in real if count]


def test_what_blocks_keep_is_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest micro-batch said to fit would run out of memory, or a GPU would stay half empty."""
    monkeypatch.setattr(torch.nn.functional, "rms_norm", KeepsItsInput.apply)
    for choice in ("none", 2, "all"):
        engine = {"kind": "single", "precision": "fp32", "activation_checkpointing": choice}
        config = run_config("tiny", engine, 1)
        model = Decoder(config.model)
        for index, block in enumerate(model.blocks):
            torch.nn.Module.__setattr__(block, "recompute", choice == "all" or (choice == 2 and index % 2 == 0))
        tokens = torch.zeros((MICRO, SEQ_LEN), dtype=torch.long)
        model(tokens, tokens)  # makes the tables of the rotary embedding
        with Ledger((0, 0)) as ledger:
            before = ledger.now
            loss = model(tokens, tokens)
            kept = ledger.now - before
        del loss
        c, n, D = 4, MICRO * SEQ_LEN, config.model.hidden_size
        planned = activations.micro_batch(config, "cpu").backward["activations"]
        head = c * D * (config.model.vocab_size + 2 * n)  # the gradients that wait, and the last norm's input
        assert abs(kept - (planned + head)) <= 0.05 * (planned + head), choice


class KeepsItsInput(torch.autograd.Function):
    """A norm that keeps what the fused kernel of a GPU keeps: its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rate = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, rate, weight)
        normed: torch.Tensor = x * rate * weight
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise NotImplementedError


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


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--gpu", "h10O"], 'did you mean "h100"?'),
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
    batch = {"global_sequences": 16, "micro": 8, "seq_len": 1024}
    config = run_config(preset, {"kind": "single"}, 1, batch=batch)
    with open_world(60, collectives=False) as world:
        torch.cuda.reset_peak_memory_stats()
        engine = build_engine(config, world)
        engine.load(Constant(), 0)
        tokens = torch.zeros((8, 1024), dtype=torch.long)
        for _ in range(2):
            engine.train_step([Batch(tokens, tokens)] * 2, 1.0)
        peak = torch.cuda.max_memory_allocated()
    assert peak == pytest.approx(memory(config, 1).total, rel=0.15)
