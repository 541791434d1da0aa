"""Muon for the blocks' matrices: torch's own update, whole or sharded, and checkpoints as exact as those of AdamW."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmtrain.checkpoint.convert import convert
from llmtrain.checkpoint.flat import FlatReader, write_rank_file
from llmtrain.checkpoint.inspect import diff, open_named
from llmtrain.checkpoint.places import Place
from llmtrain.checkpoint.store import open_checkpoint
from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.data.batches import Batch
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, MOMENTUM, WEIGHT
from llmtrain.engines.muon import SCALE, ShardedMuon
from llmtrain.errors import ConfigError
from llmtrain.model.decoder import Decoder
from llmtrain.model.initial import initial_slice, is_block_matrix, parameter_shapes
from llmtrain.planner import state
from llmtrain.planner.fit import layouts
from llmtrain.planner.gpus import Gpu
from llmtrain.planner.memory import checkpoint_bytes, memory
from llmtrain.train.start import InitialValues
from tests import ranks
from tests.test_layouts import on_disk, step_folder
from tests.test_resume import history, weights
from tests.test_schedule_contract import Runs

HALF, END = 10, 20
WORDS = ("optim.name=muon", "schedule.peak=0.001", "checkpoint.every=10 steps")


def changed(prepared: dict[str, Any], optim: dict[str, Any], **engine: Any) -> Config:
    """The small config with Muon and these settings."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(prepared))
    return validate({**values, "optim": {"name": "muon", **optim}, "engine": {**values["engine"], **engine}}, "config")


@pytest.fixture(scope="module")
def runs(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of each engine, never interrupted, with a checkpoint half way."""
    made = Runs(tmp_path_factory.mktemp("muon"), prepared)
    for engine in ("single", "fsdp"):
        made.must(made.folder / engine, engine, 0, *WORDS)
    return made


def some_batches(update: int) -> list[Batch]:
    """Two micro-batches, others in every update."""
    tokens = (torch.arange(2 * 2 * 33).reshape(2, 2, 33) * (update + 3)) % 350
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]


def test_an_update_is_that_of_torch(prepared: dict[str, Any]) -> None:
    """What is called Muon would be something else, or clip, rates and decay would not reach all parameters."""
    config = changed(prepared, {"lr_factors": {"embed": 2.0, "head": 0.5}, "weight_decay": 0.3, "clip": 0.5})
    peak, multipliers, decays = config.schedule.peak, (0.25, 1.0, 0.5), (1.0, 0.5, 0.25)
    plain = Decoder(config.model)
    named = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            first = initial_slice(config.model, name, 0, parameter.numel(), config.run.seed)
            parameter.copy_(torch.from_numpy(first).view_as(parameter))
    matrices = [p for name, p in named.items() if is_block_matrix(name)]
    assert len(matrices) == 7 * config.model.num_layers
    embed, head = named["embed.weight"], named["head.weight"]
    norms = [p for name, p in named.items() if name.endswith("norm.weight")]
    muon = torch.optim.Muon(matrices, lr=0.0, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": part} for part in ([head], [embed], norms)], betas=(0.9, 0.95), fused=True)
    with open_world(60, collectives=False) as world:
        engine: Any = build_engine(config, world)
        engine.load(InitialValues(config), 0)
        for update, (multiplier, decay) in enumerate(zip(multipliers, decays, strict=True)):
            stats = engine.train_step(some_batches(update), multiplier, decay)
            assert (stats.lr, stats.weight_decay) == (peak * multiplier, 0.3 * decay)
            valid = sum(batch.num_valid for batch in some_batches(update))
            for batch in some_batches(update):
                (plain(batch.tokens, batch.targets, None) / valid).backward()
            assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.5
            for group, factor, share in zip(
                [*muon.param_groups, *adamw.param_groups], (1.0, 0.5, 2.0, 1.0), (1, 1, 0, 0), strict=True
            ):
                group["lr"], group["weight_decay"] = peak * multiplier * factor, 0.3 * decay * share
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
            for name, parameter in named.items():
                assert torch.equal(engine.masters[name], parameter), (name, update)


def sharded_and_whole(output: Path) -> None:
    """On every rank: updates of whole matrices, and of the same ones sharded; writes which of them differ."""
    shapes = [(7, 5), (5, 7), (2, 9), (7, 5), (12, 4)]
    with open_world(60, collectives=True) as world:
        mesh = init_device_mesh("cpu", (world.size,))
        generator = torch.Generator().manual_seed(3)
        whole = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        sharded = [torch.nn.Parameter(distribute_tensor(one.detach().clone(), mesh, [Shard(0)])) for one in whole]
        options: Any = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": SCALE}
        one, many = torch.optim.Muon(whole, **options), ShardedMuon(sharded, **options)
        many.state.update({p: {MOMENTUM: torch.zeros_like(p)} for p in sharded})
        for _ in range(3):
            for large, small in zip(whole, sharded, strict=True):
                large.grad = torch.randn(large.shape, generator=generator)
                small.grad = distribute_tensor(large.grad.clone(), mesh, [Shard(0)])
            one.step()  # type: ignore[no-untyped-call]
            many.step()
        assert min(small.to_local().shape[0] for small in sharded) == 0 or world.rank < world.size - 1
        odd = []
        for index, (large, small) in enumerate(zip(whole, sharded, strict=True)):
            for here, there in ((large, small), (one.state[large][MOMENTUM], many.state[small][MOMENTUM])):
                assert isinstance(there, DTensor)
                odd += [] if torch.equal(here, there.full_tensor()) else [index]
        (output / f"odd_{world.rank}.json").write_text(json.dumps(odd))
        world.barrier()


def test_a_sharded_matrix_gets_the_update_of_the_whole(tmp_path: Path) -> None:
    """Sharding would orthogonalise parts of matrices: another optimizer for every number of GPUs."""
    ranks.start(tmp_path, 3, sharded_and_whole, tmp_path).succeeded()
    assert [json.loads((tmp_path / f"odd_{rank}.json").read_text()) for rank in range(3)] == [[], [], []]


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_an_interrupted_run_equals_the_straight_one(runs: Runs, engine: str) -> None:
    """A job that was interrupted would go on to another model."""
    straight, resumed = runs.folder / engine, runs.folder / f"{engine}_resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(step_folder(resumed, END))
    assert "RESUMED" in runs.must(resumed, engine, 0, *WORDS)
    assert history(resumed) == history(straight)
    assert weights(resumed) == weights(straight)


def test_shards_train_as_one_device_does(runs: Runs) -> None:
    """More GPUs would train another model.

    Newton-Schulz in bf16 makes more of a rounding than AdamW does: two ways to cut a batch on one device were 2e-6
    apart here, and 7e-5 at a peak ten times as high.
    """
    there, here = ([json.loads(row) for row in history(runs.folder / engine)] for engine in ("single", "fsdp"))
    for one, other in zip(there, here, strict=True):
        assert one["lr"] == other["lr"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert there[-1]["loss"] < there[0]["loss"] - 0.1


def moved(config: Config, source: Path, target: Path) -> None:
    """On every rank: load a checkpoint's files and write them again, with no update made."""
    with open_world(60, collectives=config.engine.kind == "fsdp") as world:
        engine = build_engine(config, world)
        engine.load(FlatReader(Place(source), sorted(path.name for path in source.glob("rank_*"))), HALF)
        write_rank_file(target / f"rank_{world.rank:05d}.safetensors", engine.state())
        world.barrier()


def test_state_moves_between_engines_unchanged(prepared: dict[str, Any], runs: Runs, tmp_path: Path) -> None:
    """A run that moves to other GPUs and back would lose its momentum, or some of it."""
    folders = [step_folder(runs.folder / "single", HALF), tmp_path / "fsdp", tmp_path / "single"]
    for folder, count, source in ((folders[1], 2, folders[0]), (folders[2], 1, folders[1])):
        folder.mkdir()
        config = changed(prepared, {}, kind=folder.name)
        ranks.start(tmp_path / f"{folder.name}_logs", count, moved, config, source, folder).succeeded()
    first, *others = (on_disk(folder) for folder in folders)
    shapes = parameter_shapes(changed(prepared, {}).model)
    kinds = {WEIGHT: set(shapes), EXP_AVG: set(shapes), EXP_AVG_SQ: {n for n in shapes if not is_block_matrix(n)}}
    assert set(first) == {(kind, name) for kind, names in kinds.items() for name in names}
    assert all(tensor.any() for tensor in first.values())
    for other in others:
        assert set(other) == set(first)
        assert all(other[key].numpy().tobytes() == first[key].numpy().tobytes() for key in first)


def test_the_checkpoint_commands_take_it(runs: Runs, tmp_path: Path) -> None:
    """A checkpoint could not be moved to a store or compared, because it has no second moment of a matrix."""
    named = f"{runs.folder / 'fsdp'}@{HALF}"
    made = convert(named, str(tmp_path), 3, lambda done, total: None)
    rows, tensors = diff(open_named(named), open_checkpoint(made))
    assert not rows and not tensors
    _, tensors = diff(open_named(named), open_named(f"{runs.folder / 'fsdp'}@{END}"))
    assert {EXP_AVG, EXP_AVG_SQ, WEIGHT} == {tensor.kind for tensor in tensors}


def test_a_checkpoint_of_adamw_is_refused(runs: Runs) -> None:
    """A run would go on with half of another optimizer's state."""
    run = runs.folder / "adamw"
    runs.must(run, "single", 2, *WORDS, "optim.name=adamw")
    code, text = runs.leg(run, "single", 4, *WORDS)
    assert code == 2 and "optim.name: there 'adamw', in this config 'muon'" in text, text


def test_deepspeed_is_refused(prepared: dict[str, Any]) -> None:
    """ZeRO's flat parts would fail in the middle of an update, or be orthogonalised as they are."""
    with pytest.raises(ConfigError, match=r'"muon" runs on engine\.kind single and fsdp.*--set engine\.kind=fsdp'):
        changed(prepared, {}, kind="deepspeed")


def test_the_planner_counts_one_moment_a_matrix(prepared: dict[str, Any]) -> None:
    """A model that fits would be said not to, or be sent to ZeRO, which cannot train it so."""
    config = changed(prepared, {})
    shapes = parameter_shapes(config.model)
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if is_block_matrix(name))
    for kind, count in (("single", 1), ("fsdp", 2)):
        own, adamw = changed(prepared, {}, kind=kind), changed(prepared, {"name": "adamw"}, kind=kind)
        with_muon, without = state.holdings(own, count).always, state.holdings(adamw, count).always
        assert without["moments"] - with_muon["moments"] == 4 * matrices // count
        assert {**without, "moments": 0} == {**with_muon, "moments": 0}
    with open_world(60, collectives=False) as world:
        engine = build_engine(config, world)
        engine.load(InitialValues(config), 0)
        held = [t.nbytes for piece in engine.state().slices for kind, t in piece.tensors.items() if kind != WEIGHT]
    assert sum(held) == state.holdings(config, 1).always["moments"]
    parameters = sum(math.prod(shape) for shape in shapes.values())
    assert checkpoint_bytes(config, parameters) == memory(config, 1).host["checkpoint"] == sum(held) + 4 * parameters
    possible = {one.name for one in layouts(config, 1, Gpu("a GPU", 2**34, None)) if one.total is not None}
    assert possible == {"single", "fsdp"}
