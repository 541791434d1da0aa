"""Gradients of weights that products add to an fp32 sum, against those in bf16 that an engine folds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.engines import build_engine, single
from llmtrain.engines.base import Engine
from llmtrain.engines.single import SingleEngine
from llmtrain.model.projection import Linear, add_weight_gradient
from llmtrain.train.start import InitialValues

WORLD = World(0, 1, 0, torch.device("cpu"))
HIDDEN, FFN = 64, 100


def described(accumulation: int = 4, tied: bool = False, **engine: Any) -> Config:
    return validate(
        {
            "run": {"name": "small", "seed": 3},
            "model": {
                "hidden_size": HIDDEN,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "ffn_size": FFN,
                "vocab_size": 400,
                "max_seq_len": 32,
                "tie_embeddings": tied,
            },
            "data": {"path": "none", "tokenizer": {"kind": "sentencepiece", "vocab_size": 350}},
            "batch": {"global_sequences": 2 * accumulation, "micro": 2, "seq_len": 32},
            "schedule": {"name": "constant", "peak": 0.01, "horizon": "20 steps"},
            "engine": {"kind": "single", "precision": "bf16", **engine},
        },
        "test",
    )


def batches(config: Config, update: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(update)
    shape = (config.batch.accumulation(1), 2, 33)
    tokens = torch.randint(0, 400, shape, generator=generator)
    return [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


@pytest.fixture
def summing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let this CPU's products add to sums, as a GPU's do, or not."""
    return lambda on: monkeypatch.setattr(single, "sums_in_products", lambda device: on)


def started(config: Config) -> SingleEngine:
    engine = build_engine(config, WORLD)
    assert isinstance(engine, SingleEngine)
    engine.load(InitialValues(config), 0)
    return engine


def trained(engine: Engine, config: Config, updates: range) -> list[tuple[float, float]]:
    made = [engine.train_step(batches(config, update), 1.0) for update in updates]
    return [(stats.loss.item(), stats.grad_norm.item()) for stats in made]


def state_of(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    return {(piece.name, kind): x.clone() for piece in engine.state().slices for kind, x in piece.tensors.items()}


def gradients(engine: SingleEngine, config: Config) -> dict[str, torch.Tensor]:
    """Of one update, before it is made."""
    kept: dict[str, torch.Tensor] = {}

    def keep() -> None:
        kept.update({name: m.grad.clone() for name, m in engine.masters.items() if m.grad is not None})

    engine.optimizer.step = keep
    engine.train_step(batches(config, 1), 1.0)
    return kept


@pytest.mark.parametrize("accumulation", [1, 2, 3, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_sums_are_the_gradients_within_rounding(summing: Any, accumulation: int, tied: bool) -> None:
    """A model on a GPU would learn from other gradients than the reference says."""
    config = described(accumulation, tied)
    summing(False)
    folded = gradients(started(config), config)
    summing(True)
    engine = started(config)
    summed = gradients(engine, config)
    exact = gradients(started(described(accumulation, tied, precision="fp32")), config)
    assert summed.keys() == folded.keys() == exact.keys()
    assert bool(engine.sums) == (accumulation > 1), "one micro-batch has nothing to add to"
    for name, gradient in summed.items():
        size = exact[name].norm()
        assert (gradient - folded[name]).norm() <= 2**-7 * size, name
        assert (gradient - exact[name]).norm() <= 1.01 * (folded[name] - exact[name]).norm() + 1e-6 * size, name


def test_a_sum_is_that_of_fp32_products() -> None:
    """What the operation adds would be rounded on the way, or be another product."""
    generator = torch.Generator().manual_seed(0)
    gradient, x = (torch.randn(64, size, generator=generator).bfloat16() for size in (5, 7))
    before = torch.randn(5, 7, generator=generator)
    total = before.clone()
    add_weight_gradient(total, gradient, x)
    wanted = before.double() + gradient.double().t() @ x.double()
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
def test_recomputing_changes_no_bit(summing: Any, recompute: str) -> None:
    """A run would change when it is made to fit, or count a gradient twice."""
    summing(True)
    config = described(activation_checkpointing=recompute)
    engine, reference = started(config), started(described())
    assert trained(engine, config, range(1, 4)) == trained(reference, config, range(1, 4))
    states = state_of(engine), state_of(reference)
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_resumed_run_is_the_same_bit_for_bit(summing: Any, deterministic: bool) -> None:
    """A run on a GPU would not resume exactly."""
    summing(True)
    config = described(deterministic=deterministic)
    straight = started(config)
    losses = trained(straight, config, range(1, 5))
    first = started(config)
    assert trained(first, config, range(1, 3)) == losses[:2]
    saved = state_of(first)

    class Saved:
        def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
            return saved[name, kind][start:stop]

    second = build_engine(config, WORLD)
    second.load(Saved(), 2)
    assert trained(second, config, range(3, 5)) == losses[2:]
    states = state_of(straight), state_of(second)
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # what dynamo does itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_compiled_blocks_add_to_the_same_sums(
    summing: Any, recompute: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A compiled run would copy every sum, or lose what a graph adds to it."""
    request.addfinalizer(torch._dynamo.reset)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
    summing(True)
    config = described(compile=True, activation_checkpointing=recompute)
    engine, reference = started(config), started(described())
    places = {name: total.data_ptr() for name, total in engine.sums.items()}
    compiled, eager = trained(engine, config, range(1, 3)), trained(reference, config, range(1, 3))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-3, atol=0)
    assert {name: total.data_ptr() for name, total in engine.sums.items()} == places
    assert all(engine.masters[name].grad is total for name, total in engine.sums.items())


class MadeMatrices(TorchDispatchMode):
    """Counts the bf16 tensors of some shapes that operations make anew."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 and tuple(x.shape) in self.shapes:
                self.count += x.untyped_storage().data_ptr() not in given
        return out


@pytest.mark.parametrize("on", [False, True])
def test_no_bf16_gradient_of_a_projection_exists(summing: Any, on: bool) -> None:
    """The plan would leave out memory that a run takes."""
    summing(on)
    config = described()
    engine = started(config)
    matrices = {name: module for name, module in engine.model.named_modules() if isinstance(module, Linear)}
    with MadeMatrices({(FFN, HIDDEN), (HIDDEN, FFN)}) as made:
        engine.train_step(batches(config, 1), 1.0)
    assert made.count == (0 if on else 3 * 2 * 4), "gate, up and down of two blocks in four micro-batches"
    held = sum(total.numel() * total.element_size() for total in engine.sums.values())
    assert held == (4 * sum(module.weight.numel() for module in matrices.values()) if on else 0)
