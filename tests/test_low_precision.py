"""Moments in 8 bits and products in fp8: as close as they say, resumed to the byte, refused where they cannot be."""

import copy
import json
import math
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.distributed import World
from llmtrain.engines import build_engine, eightbit, fp8
from llmtrain.engines.adamw8bit import AdamW8bit
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT, FlatState, start_moments
from llmtrain.engines.eightbit import BLOCK, Moment, Unpacked
from llmtrain.engines.optimizers import build_optimizer
from llmtrain.errors import ConfigError, EnvironmentError
from llmtrain.model.initial import parameter_shapes
from llmtrain.planner import state
from llmtrain.planner.fit import layouts
from llmtrain.planner.gpus import Gpu
from llmtrain.planner.memory import checkpoint_bytes, memory
from llmtrain.train.average import Averaging, Held, copied
from llmtrain.train.start import InitialValues
from llmtrain.trajectory import trajectory_of
from tests import test_fast
from tests.test_layouts import on_disk, step_folder
from tests.test_resume import history, weights
from tests.test_schedule_contract import Runs

HALF, END = 10, 20
CPU = torch.device("cpu")
BOUNDS = {True: 0.0106, False: 0.0036}  # the largest rounding, of a block's largest magnitude
SIXTEENS = ("model.hidden_size=64", "model.ffn_size=112")
LOW = (*SIXTEENS, "optim.name=adamw8bit", "engine.precision=bf16", "checkpoint.every=10 steps")
WORDS = {"single": LOW, "fsdp": (*LOW, "engine.fp8=rowwise")}  # a process takes seconds to import what fp8 needs
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, where torchao imports it


def changed(optim: str = "adamw", **engine: Any) -> Config:
    """A model whose sizes 16 divides, with this optimizer and engine."""
    values: dict[str, Any] = copy.deepcopy(test_fast.SMALL)
    values["model"].update(hidden_size=64, ffn_size=112)
    return validate({**values, "optim": {"name": optim}, "engine": {**values["engine"], **engine}}, "config")


def started(config: Config) -> Any:
    engine = build_engine(config, World(0, 1, 0, CPU))
    engine.load(InitialValues(config), 0)
    return engine


def losses(config: Config, updates: int) -> tuple[Any, list[float]]:
    """An engine after so many updates of the batches of `test_fast`, and their losses."""
    engine = started(config)
    made = zip(range(updates), test_fast.batches(), strict=False)
    return engine, [engine.train_step(batches, min(1.0, (k + 1) / 5)).loss.item() for k, batches in made]


def written(values: Tensor, signed: bool) -> Moment:
    moment = Moment(values.numel(), signed, CPU)
    moment.copy_(values)
    return moment


def read(moment: Moment) -> Tensor:
    return moment.read(0, moment.codes.numel())


def some_values(signed: bool, blocks: int = 2048) -> Tensor:
    """Blocks of every size that fp32 has room for, of one size and of many, empty ones, and half a block at the end."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(blocks, BLOCK, generator=generator)
    values *= torch.exp(4 * torch.randn(blocks, BLOCK, generator=generator))
    values *= 10 ** (torch.rand(blocks, 1, generator=generator) * 50 - 32)
    values[::7] = 0
    return (values if signed else values.abs()).view(-1)[: -BLOCK // 2]


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_read_is_kept_in_the_same_bytes(signed: bool) -> None:
    """A resumed run, or one that was judged with its average, would go on with other moments."""
    first = written(some_values(signed), signed)
    again = written(read(first), signed)
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.scales, first.scales)
    assert set(first.codes.tolist()) == set(range(256))


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_as_small_as_promised(signed: bool) -> None:
    """Moments would be lost, or moving to other ranks would cost more than was said."""
    values = some_values(signed)
    once = read(written(values, signed))
    moved = torch.cat([read(written(part, signed)) for part in (once[:100], once[100:])])  # blocks begin elsewhere
    whole = torch.cat([read(written(part, signed)) for part in (once[: 8 * BLOCK], once[8 * BLOCK :])])
    assert torch.equal(whole, once)
    blocks = values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK)
    largest = blocks.abs().amax(1).clamp(min=eightbit.SMALLEST)
    error = (once[: blocks.numel()].view(-1, BLOCK) - blocks).abs().amax(1) / largest
    assert 0.5 * BOUNDS[signed] < error.max() <= BOUNDS[signed]
    around = torch.maximum(torch.maximum(largest, largest.roll(1)), largest.roll(-1))
    error = (moved - once)[: blocks.numel()].view(-1, BLOCK).abs().amax(1) / around
    assert 0 < error.max() <= BOUNDS[signed]


def test_a_second_moment_is_never_rounded_to_nothing() -> None:
    """The next step of an element with a small gradient would be its first moment over eps: a jump."""
    values = some_values(signed=False)
    kept = read(written(values, signed=False)).view(-1)
    assert torch.equal(kept == 0, values == 0)
    assert torch.equal(read(Moment(300, True, CPU)), torch.zeros(300))


def nearest(values: np.ndarray[Any, Any], signed: bool) -> np.ndarray[Any, Any]:
    """The slow obvious rounding: of every block's elements the nearest level, found by looking at all."""
    out = np.empty_like(values)
    levels = eightbit._levels(signed)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        scale = max(np.abs(block).max(), np.float32(eightbit.SMALLEST))
        codes = np.abs(block[:, None] / scale - levels).argmin(1)
        if not signed:
            codes = np.maximum(codes, block > 0)
        out[start : start + BLOCK] = levels[codes] * scale
    return out


def test_an_update_is_that_of_adamw_with_rounded_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called AdamW would be something else, or wrong where a parameter is updated in parts."""
    monkeypatch.setitem(eightbit.CHUNK_ELEMENTS, "cpu", 2 * BLOCK)
    generator = torch.Generator().manual_seed(9)
    matrix, norm = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((37, 40), (40,)))
    named = [("blocks.0.ffn.w_up.weight", matrix), ("norm.weight", norm)]
    optim = changed("adamw8bit").optim
    optimizer = build_optimizer(named, optim)
    assert isinstance(optimizer, AdamW8bit)
    start_moments(optimizer, [matrix, norm], 0)
    expected = {name: [p.detach().numpy().copy(), np.zeros_like(p.detach().numpy()), 0.0] for name, p in named}
    for k, lr in enumerate((0.01, 0.02, 0.005), start=1):
        for group, (name, parameter) in zip(optimizer.param_groups, named, strict=True):
            group["lr"], group["weight_decay"] = lr, 0.3
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            weight, mean, square = expected[name]
            g = parameter.grad.numpy()
            mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
            step = lr * mean / (1 - 0.9**k) / (np.sqrt(square / (1 - 0.95**k)) + 1e-8)
            if parameter is matrix:
                mean, square = (
                    nearest(one.astype(np.float32).ravel(), s).reshape(g.shape)
                    for one, s in ((mean, True), (square, False))
                )
            expected[name] = [weight * (1 - lr * 0.3) - step, mean, square]
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in named:
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name][0], rtol=0, atol=2e-6)
    assert isinstance(optimizer.state[matrix][EXP_AVG], Moment) and isinstance(optimizer.state[norm][EXP_AVG], Tensor)


def test_a_model_learns_as_with_adamw() -> None:
    """Rounding the moments would cost quality: over 100 updates the largest difference was 0.006 nats."""
    _, adamw = losses(changed("adamw"), 25)
    _, low = losses(changed("adamw8bit"), 25)
    assert low[0] == adamw[0] and low[-1] < low[0] - 1
    np.testing.assert_allclose(low, adamw, rtol=0, atol=2e-2)


def snapshot(flat: FlatState) -> dict[tuple[str, str], bytes]:
    return {(piece.name, kind): t.numpy().tobytes() for piece in flat.slices for kind, t in piece.tensors.items()}


def test_judging_an_average_leaves_the_run_as_it_is() -> None:
    """Every validation with an average, and every test for a learning rate, would round the moments anew."""
    engine, _ = losses(changed("adamw8bit", precision="bf16"), 3)
    averaging = Averaging(engine, 5)
    averaging.averages = {p.name: p.tensors[WEIGHT] * 0.5 for p in engine.state().slices}
    before = snapshot(engine.state())
    kept = copied(engine.state())
    with averaging.averaged():
        assert snapshot(engine.state()) != before
    assert snapshot(engine.state()) == before
    engine.train_step(next(test_fast.batches()), 1.0)
    assert snapshot(engine.state()) != before == snapshot(kept)
    assert {type(piece.tensors) for piece in engine.state().slices} == {dict, Unpacked}


@pytest.fixture(scope="module")
def runs(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of each engine, never interrupted, with a checkpoint half way."""
    made = Runs(tmp_path_factory.mktemp("low"), prepared)
    for engine in ("single", "fsdp"):
        made.must(made.folder / engine, engine, 0, *WORDS[engine])
    return made


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_an_interrupted_run_equals_the_straight_one(runs: Runs, engine: str) -> None:
    """A job that was interrupted would go on to another model."""
    straight, resumed = runs.folder / engine, runs.folder / f"{engine}_resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(step_folder(resumed, END))
    text = runs.must(resumed, engine, 0, *WORDS[engine])
    assert "RESUMED" in text and "; moments of matrices in 8 bits" in text, text
    assert ("products of the blocks in fp8 (rowwise scales, emulated on this CPU)" in text) == (engine == "fsdp"), text
    assert history(resumed) == history(straight)
    assert weights(resumed) == weights(straight)


def test_shards_train_as_one_device_does(runs: Runs) -> None:
    """More GPUs would train another model, and a checkpoint would hold other names, or less than fp32."""
    there, here = ([json.loads(row) for row in history(runs.folder / engine)] for engine in ("single", "fsdp"))
    assert [row["lr"] for row in there] == [row["lr"] for row in here]
    apart = np.abs([one["loss"] - other["loss"] for one, other in zip(there, here, strict=True)])
    # fp8 at a high rate: a batch of eight short sequences may be far off, all of them together are not.
    assert apart.mean() < 2e-2 and apart.max() < 0.2
    assert there[-1]["loss"] < there[0]["loss"] - 0.1
    shapes = parameter_shapes(runs.config(*LOW).model)
    for engine in ("single", "fsdp"):
        held = on_disk(step_folder(runs.folder / engine, END))
        assert set(held) == {(kind, name) for name in shapes for kind in (WEIGHT, EXP_AVG, EXP_AVG_SQ)}
        assert {tensor.dtype for tensor in held.values()} == {torch.float32}


@quiet
def test_fp8_trains_near_bf16_resumes_exactly_and_is_judged_as_bf16() -> None:
    """fp8 would cost quality, a resumed run go another way, or a score not be that of the exported weights."""
    plain, bf16 = losses(changed(precision="bf16"), 6)
    first, *later = (batches for batches, _ in zip(test_fast.batches(), range(3), strict=False))
    for recipe in ("tensorwise", "rowwise"):
        engine, low = losses(changed(precision="bf16", fp8=recipe, activation_checkpointing=2), 6)
        assert all(one != other for one, other in zip(low, bf16, strict=True))
        np.testing.assert_allclose(low, bf16, rtol=0, atol=2e-2)
        assert [name for name, _ in engine.model.named_parameters()] == list(plain.masters)
        again = started(changed(precision="bf16", fp8=recipe))
        again.load(Held(copied(engine.state())), 6)
        for batches in later:
            assert again.train_step(batches, 1.0).loss == engine.train_step(batches, 1.0).loss
        engine.load(Held(copied(plain.state())), 6)
        with engine.evaluating(), plain.evaluating():
            assert torch.equal(engine.nats(first[0]), plain.nats(first[0]))
        assert f"products of the blocks in fp8 ({recipe} scales, emulated on this CPU)" in engine.describe()
    assert "fp8" not in plain.describe()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({"kind": "deepspeed"}, r"runs on engine\.kind single and fsdp.*--set engine\.kind=fsdp"),
        ({"precision": "fp32"}, r"engine\.precision: bf16"),
        ({"ffn_size": 100}, r"model\.ffn_size is 100; the nearest are 96 and 112"),
        ({"seq_len": 4}, r"batch\.micro \* batch\.seq_len, is 8"),
        ({"num_heads": 8, "num_kv_heads": 1}, r"model\.num_kv_heads \* head size, is 8"),
    ],
)
def test_fp8_is_refused_where_it_cannot_be(words: dict[str, Any], wanted: str) -> None:
    """A run would fail in its first product, on every rank, with words about strides."""
    values: dict[str, Any] = copy.deepcopy(test_fast.SMALL)
    values["model"].update(hidden_size=64, ffn_size=112)
    values["engine"].update(precision="bf16", fp8="tensorwise")
    for section in values.values():
        section.update({key: value for key, value in words.items() if key in section})
    with pytest.raises(ConfigError, match=wanted):
        validate(values, "config")


@quiet
def test_a_machine_without_fp8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of an older GPU, or without torchao, would read an error of somebody else's."""
    config, gpu = changed(precision="bf16", fp8="rowwise"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has compute capability 8\.0.*--set engine\.fp8=none"):
        fp8.use_fp8(started(changed(precision="bf16")).model, config, gpu)
    for module in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentError, match=r"pip install 'llmtrain\[fp8\]'"):
        started(config)


def test_another_arithmetic_is_another_training() -> None:
    """A run in bf16 would go on in fp8 unasked, or older checkpoints no longer be gone on from."""
    bf16, low = (trajectory_of(changed(precision="bf16", **more), "data") for more in ({}, {"fp8": "rowwise"}))
    assert {**bf16, "fp8": "rowwise"} == low and "fp8" not in bf16


def test_deepspeed_is_refused() -> None:
    """ZeRO would train with another optimizer than the one asked for."""
    with pytest.raises(ConfigError, match=r'"adamw8bit" runs on engine\.kind single and fsdp.*--set engine\.kind=fsdp'):
        changed("adamw8bit", kind="deepspeed")


def test_the_planner_counts_a_byte_an_element() -> None:
    """A model that fits would be said not to, or one would be said to fit that does not."""
    config = changed("adamw8bit", precision="bf16", fp8="rowwise")
    shapes = parameter_shapes(config.model)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    engine = started(changed("adamw8bit", precision="bf16"))
    held = [
        one.nbytes for own in engine.optimizer.state.values() for kind, one in own.items() if kind.startswith("exp_avg")
    ]
    assert sum(held) == state.holdings(config, 1).always["moments"] < 2.1 * parameters
    sharded = changed("adamw8bit", kind="fsdp", precision="bf16")
    assert state.holdings(sharded, 2).always["moments"] == pytest.approx(sum(held) / 2, rel=0.01)
    assert checkpoint_bytes(config, parameters) == 12 * parameters
    assert memory(config, 1).host["checkpoint"] == pytest.approx(12 * parameters, rel=1e-3)
    for low in (config, changed("adamw8bit"), changed(precision="bf16", fp8="rowwise")):
        possible = {one.name for one in layouts(low, 1, Gpu("a GPU", 2**34, None)) if one.total is not None}
        assert possible == {"single", "fsdp"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@quiet
def test_on_a_gpu_compiled_fp8_trains_near_bf16_and_resumes_exactly(recipe: str) -> None:
    """The kernels of a GPU would train something else than what is emulated here, or not the same twice."""
    world, batches = (
        World(0, 1, 0, torch.device("cuda", 0)),
        [made for made, _ in zip(test_fast.batches(), range(20), strict=False)],
    )

    def trained(config: Config, start: Any, since: int, stop: int) -> tuple[Any, list[float]]:
        engine = build_engine(config, world)
        engine.load(start, since)
        return engine, [engine.train_step(batches[k], 1.0).loss.item() for k in range(since, stop)]

    low = changed("adamw8bit", precision="bf16", fp8=recipe, compile=True)
    _, bf16 = trained(changed(precision="bf16"), InitialValues(low), 0, 20)
    _, straight = trained(low, InitialValues(low), 0, 20)
    engine, first = trained(low, InitialValues(low), 0, 10)
    _, second = trained(low, Held(copied(engine.state())), 10, 20)
    assert first + second == straight
    np.testing.assert_allclose(straight, bf16, rtol=0, atol=3e-2)
