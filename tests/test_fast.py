"""The fast path trains what the plain one does: compiled, recomputed, chunked, reduced late, and resumed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.engines import build_engine
from llmtrain.engines.base import StepStats, parameter_groups
from llmtrain.engines.single import SingleEngine
from llmtrain.errors import ConfigError
from llmtrain.model import loss as loss_module
from llmtrain.model.decoder import Decoder
from llmtrain.schedules import plan
from llmtrain.train.late import Late
from llmtrain.train.start import InitialValues
from tests import ranks
from tests.ranks import Ranks
from tests.test_engines import changed, numbers, traces
from tests.test_resume import ENGINES, history, weights

UPDATES = 100
GOLDEN = Path(__file__).parent / "golden_curve.json"
SMALL: dict[str, Any] = {
    "run": {"name": "golden", "seed": 11},
    "model": {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 100,
        "vocab_size": 300,
        "max_seq_len": 32,
    },
    "data": {"path": "none", "tokenizer": {"kind": "sentencepiece", "vocab_size": 300}},
    "batch": {"global_sequences": 4, "micro": 2, "seq_len": 32},
    "schedule": {"name": "cosine", "peak": 3e-3, "warmup": "10 steps", "horizon": "100 steps", "floor": 0.1},
    "engine": {"kind": "single", "precision": "fp32"},
}


def config_with(**engine: Any) -> Config:
    return validate({**SMALL, "engine": {**SMALL["engine"], **engine}}, "golden")


def batches() -> Iterator[list[Batch]]:
    """Two micro-batches an update, of text that can be learnt: each token follows from the last by one of three."""
    generator = np.random.Generator(np.random.Philox(key=5))
    while True:
        steps = generator.choice([1, 7, 31], size=(4, 33), p=[0.7, 0.2, 0.1])
        tokens = torch.from_numpy((generator.integers(300, size=(4, 1)) + steps.cumsum(axis=1)) % 300)
        pairs = [(tokens[i : i + 2, :-1].contiguous(), tokens[i : i + 2, 1:].contiguous()) for i in (0, 2)]
        yield [Batch(*pair) for pair in pairs]


def engine_losses(config: Config) -> list[float]:
    """Losses of the first updates, as the engine makes them."""
    engine = build_engine(config, World(0, 1, 0, torch.device("cpu")))
    engine.load(InitialValues(config), 0)
    schedule = plan(config.schedule, config.batch.tokens)
    made = zip(range(1, UPDATES + 1), batches(), strict=False)
    return [engine.train_step(micro_batches, schedule(k)).loss.item() for k, micro_batches in made]


def plain_losses(config: Config) -> list[float]:
    """The slow obvious training: all logits at once, torch's cross-entropy and its AdamW, one tensor at a time."""
    model = Decoder(config.model)
    reader = SingleEngine(config, World(0, 1, 0, torch.device("cpu")))
    reader.load(InitialValues(config), 0)
    model.load_state_dict(reader.model.state_dict())
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config.optim), lr=0.0, betas=config.optim.betas, foreach=False
    )
    schedule = plan(config.schedule, config.batch.tokens)
    losses = []
    for k, micro_batches in zip(range(1, UPDATES + 1), batches(), strict=False):
        tokens = torch.cat([batch.tokens for batch in micro_batches])
        targets = torch.cat([batch.targets for batch in micro_batches])
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(k)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return plain_losses(config_with())


def write_losses(config: Config, path: Path) -> None:
    """The engine's losses with several chunks of the loss in a micro-batch, the last one shorter."""
    loss_module.chunk_tokens = lambda *_: 24
    path.write_text(json.dumps(engine_losses(config)))


def test_the_plain_path_gives_the_golden_curve(plain: list[float]) -> None:
    """A change of the code would have changed what every user's run does, unseen."""
    golden = json.loads(GOLDEN.read_text())
    np.testing.assert_allclose(plain, golden, rtol=0, atol=1e-4)
    assert plain[-1] < plain[0] - 1


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"activation_checkpointing": "all"},
        {"compile": True, "activation_checkpointing": 2},
        {"compile": True, "activation_memory": 0.2},
    ],
    ids=["eager", "recomputed", "compiled", "compiled-budget"],
)
def test_the_fast_path_has_the_losses_of_the_plain_one(
    plain: list[float], tmp_path: Path, engine: dict[str, Any]
) -> None:
    """Speed would be paid for with another training: the bound is 1e-4 over 100 updates in fp32."""
    path = tmp_path / "losses.json"
    started = ranks.start(tmp_path, 1, write_losses, config_with(**engine), path)
    assert started.wait(timeout=300) == [0], started.text()  # compiling takes long on a busy machine
    np.testing.assert_allclose(json.loads(path.read_text()), plain, rtol=0, atol=1e-4)


def test_gradients_reduced_with_the_last_micro_batch_are_the_same(prepared: dict[str, Any], tmp_path: Path) -> None:
    """`accumulation_sync: last` would drop or double the gradients of some micro-batches."""
    common = {"engine__kind": "fsdp", "batch__micro": 1}
    every = traces(tmp_path / "every", 2, changed(prepared, **common), True, 6)
    for name, more in (("last", {}), ("copies", {"engine__shard_ranks": 1})):
        config = changed(prepared, **common, engine__accumulation_sync="last", **more)
        rows = traces(tmp_path / name, 2, config, True, 6)
        np.testing.assert_allclose(numbers(rows, 0), numbers(every, 0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(numbers(rows, 1), numbers(every, 1), rtol=1e-5)


@pytest.mark.parametrize(("engine", "count"), [("single", 1), ("fsdp", 2), ("zero3", 2)])
def test_a_fast_run_resumes_exactly(leg: Callable[..., Ranks], tmp_path: Path, engine: str, count: int) -> None:
    """Code compiled in another order after a resume would round otherwise, and the run go another way."""
    options = ("compile=true", "activation_checkpointing=2", "reshard_after_forward=true")
    words = (*ENGINES[engine], *(f"engine.{option}" for option in options), "validation.every=5 steps")
    run = tmp_path / "run"
    leg("run", count, *words, "checkpoint.every=10 steps").succeeded()
    expected, final = history(run), weights(run)
    shutil.rmtree(run / "checkpoints" / "step_00000020")  # as if it had been killed before this was saved
    leg("run", count, *words, "checkpoint.every=10 steps", arguments=("--resume", "must")).succeeded()
    assert "step_00000010" in (tmp_path / "logs" / "run_1" / "rank_0.log").read_text()
    assert history(run) == expected
    assert weights(run) == final


def test_an_update_is_recorded_when_it_is_made() -> None:
    """On a CPU, rows would lag behind the training they tell of."""
    rows: list[tuple[int, float]] = []
    late = Late(torch.device("cpu"), lambda k, stats, seconds: rows.append((k, stats.loss.item())))
    for k in (1, 2):
        late.start()
        late.made(k, StepStats(torch.tensor(float(k)), torch.tensor(1.0), 0.1, 0.1))
        assert rows[-1] == (k, float(k))
    late.flush()
    assert len(rows) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_rows_come_one_update_late_and_in_order() -> None:
    """Rows would be missing, out of order, or read before their numbers are there."""
    device = torch.device("cuda", 0)
    rows: list[tuple[int, float, float]] = []
    late = Late(device, lambda k, stats, seconds: rows.append((k, stats.loss.item(), seconds)))
    work = torch.ones(2048, 2048, device=device)
    for k in range(1, 6):
        late.start()
        for _ in range(20):
            work = (work @ work).clamp(0, 1)
        late.made(k, StepStats(work.mean() * k, torch.tensor(1.0), 0.1, 0.1))
        assert len(rows) == k - 1
    late.flush()
    assert [row[:2] for row in rows] == [(k, float(k)) for k in range(1, 6)]
    assert all(row[2] > 0 for row in rows)


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        ({"activation_memory": 0.5}, "compile: true"),
        ({"activation_memory": 0.5, "compile": True, "activation_checkpointing": "all"}, "write one"),
    ],
)
def test_a_memory_budget_that_nothing_keeps_is_refused(engine: dict[str, Any], wanted: str) -> None:
    """A user would count on memory that is not saved."""
    with pytest.raises(ConfigError, match=wanted):
        config_with(**engine)
