"""Engines, batch splits and ranks change who computes, not what: losses, learning rates and samples agree."""

import gc
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.data.batches import IGNORE, Batch, TrainBatches, ValidationSet
from llmtrain.data.dataset import PreparedData, open_data
from llmtrain.data.order import Order, rank_samples, update_samples
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.fsdp import _node_ranks
from llmtrain.errors import ConfigError
from llmtrain.model.buckets import keeps_gathered
from llmtrain.schedules import plan
from llmtrain.train.start import InitialValues
from llmtrain.train.validation import evaluate
from tests import ranks

SETS = (1, 37)


def changed(config: dict[str, Any], **changes: Any) -> Config:
    """The small config with `section__key=value` changed."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config))
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return validate(values, "config")


def masked(batch: Batch) -> Batch:
    """The batch with a third of its targets ignored, chosen by the tokens alone, and some rows wholly."""
    chosen = (batch.tokens * 2654435761 + torch.arange(batch.tokens.shape[1])) % 3 == 0
    chosen[batch.tokens[:, 0] % 5 == 0] = True
    return Batch(batch.tokens, batch.targets.masked_fill(chosen, IGNORE))


def order_of(config: Config, data: PreparedData) -> Order:
    return Order(data.num_samples(config.batch.seq_len), config.run.seed, data.manifest.content_hash)


def trace(config: Config, output: Path, mask: bool, updates: int) -> None:
    """Train some updates on every rank and write what each rank saw."""
    data = open_data(config.data.path)
    schedule = plan(config.schedule, config.batch.tokens)
    with open_world(60, collectives=True) as world:
        torch.set_float32_matmul_precision("medium")
        engine = build_engine(config, world)
        engine.load(InitialValues(config), 0)
        order = order_of(config, data)
        b = config.batch
        batches = TrainBatches(
            data,
            order,
            sequences=b.sequences,
            micro=b.micro,
            seq_len=b.seq_len,
            rank=world.rank,
            world_size=world.size,
        )
        rows = []
        for k in range(1, updates + 1):
            ids = rank_samples(update_samples(order, k, b.sequences), world.size, world.rank, b.micro)
            micro_batches = [masked(batch) if mask else batch for batch in batches.update(k)]
            stats = engine.train_step(micro_batches, schedule(k))
            rows.append([stats.loss.item(), stats.grad_norm.item(), stats.lr, sorted(ids.ravel().tolist())])
        (output / f"trace_{world.rank}.json").write_text(json.dumps(rows))
        world.barrier()


def traces(output: Path, count: int, *arguments: Any, run: Callable[..., None] = trace) -> list[list[Any]]:
    """Rows of loss, gradient norm, LR and the samples of all ranks together; the first three equal on every rank."""
    output.mkdir(parents=True, exist_ok=True)
    config, *others = arguments
    ranks.start(output, count, run, config, output, *others).succeeded()
    everyone = [json.loads((output / f"trace_{rank}.json").read_text()) for rank in range(count)]
    for rows in everyone[1:]:
        assert [row[:3] for row in rows] == [row[:3] for row in everyone[0]]
    return [[*rows[0][:3], sorted(sample for row in rows for sample in row[3])] for rows in zip(*everyone, strict=True)]


def numbers(rows: list[list[Any]], column: int) -> Any:
    return np.array([row[column] for row in rows])


@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "masked-tokens"])
def test_a_global_batch_is_the_same_however_it_is_split(prepared: dict[str, Any], tmp_path: Path, mask: bool) -> None:
    """The loss would depend on the number of GPUs, or padding would weigh as much as text."""
    splits = [(1, 1, 8), (1, 8, 1), (2, 2, 2), (2, 4, 1)]
    results = []
    for world, accumulation, micro in splits:
        config = changed(prepared, batch__micro=micro, engine__kind="fsdp" if world > 1 else "single")
        assert config.batch.accumulation(world) == accumulation
        results.append(traces(tmp_path / f"{world}_{accumulation}", world, config, mask, 6))
    for rows in results[1:]:
        assert [row[2] for row in rows] == [row[2] for row in results[0]]
        assert [row[3] for row in rows] == [row[3] for row in results[0]]
        np.testing.assert_allclose(numbers(rows, 0), numbers(results[0], 0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(numbers(rows, 1), numbers(results[0], 1), rtol=1e-4)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["fsdp", 0, 1, 2, 3], ids=lambda kind: kind if kind == "fsdp" else f"zero{kind}")
def test_every_engine_trains_as_one_device_does(
    prepared: dict[str, Any], tmp_path: Path, kind: Any, count: int
) -> None:
    """Choosing ZeRO or FSDP2, or uneven shards, would choose another training."""
    reference = traces(tmp_path / "single", 1, changed(prepared, batch__global_sequences=12), True, 12)
    engine = {"kind": "fsdp"} if kind == "fsdp" else {"kind": "deepspeed", "zero_stage": kind}
    config = changed(prepared, batch__global_sequences=12, engine__kind=engine["kind"])
    config = changed(config.model_dump(mode="json"), **{f"engine__{key}": value for key, value in engine.items()})
    rows = traces(tmp_path / "engine", count, config, True, 12)
    assert [row[2:] for row in rows] == [row[2:] for row in reference]
    np.testing.assert_allclose(numbers(rows, 0), numbers(reference, 0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(numbers(rows, 1), numbers(reference, 1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["single", "fsdp", "zero1", "zero2", "zero3"])
def test_bf16_follows_fp32(prepared: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """bf16 would round the accumulated gradients or the masters, and train something worse."""
    stage = int(kind[-1]) if kind.startswith("zero") else 2
    common = {"engine__kind": "deepspeed" if kind.startswith("zero") else kind, "engine__zero_stage": stage}
    count = 1 if kind == "single" else 2
    exact = traces(tmp_path / "fp32", count, changed(prepared, batch__micro=1, **common), False, 10)
    rows = traces(
        tmp_path / "bf16", count, changed(prepared, batch__micro=1, engine__precision="bf16", **common), False, 10
    )
    np.testing.assert_allclose(numbers(rows, 0), numbers(exact, 0), rtol=0, atol=2e-2)


def test_options_of_memory_and_speed_do_not_change_the_training(prepared: dict[str, Any], tmp_path: Path) -> None:
    """Saving memory would cost quality."""
    plain = traces(tmp_path / "plain", 2, changed(prepared, engine__kind="fsdp"), False, 4)
    options: list[dict[str, Any]] = [
        {"engine__kind": "fsdp", "engine__activation_checkpointing": "all"},
        {"engine__kind": "fsdp", "engine__shard_ranks": 1},
        {"engine__kind": "deepspeed", "engine__zero_stage": 3, "engine__activation_checkpointing": 2},
        {"engine__kind": "deepspeed", "engine__zero_stage": 2, "engine__offload": {"optimizer": True}},
        {
            "engine__kind": "deepspeed",
            "engine__zero_stage": 3,
            "engine__offload": {"optimizer": True, "parameters": True},
        },
    ]
    for index, option in enumerate(options):
        rows = traces(tmp_path / f"option_{index}", 2, changed(prepared, **option), False, 4)
        np.testing.assert_allclose(numbers(rows, 0), numbers(plain, 0), rtol=0, atol=1e-5, err_msg=str(option))


def state_digest(engine: Any) -> str:
    """A hash of all that this rank would write into a checkpoint."""
    digest = hashlib.blake2b()
    for piece in engine.state().slices:
        digest.update(f"{piece.name} {piece.start} {piece.stop}".encode())
        for kind, tensor in sorted(piece.tensors.items()):
            digest.update(kind.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_each(configs: dict[str, Config], output: Path) -> None:
    """On every rank, two updates of each config: losses, the last state, DeepSpeed's ZeRO, and the second's gathers."""
    found = {}
    with open_world(60, collectives=True) as world:
        torch.set_float32_matmul_precision("medium")
        for name, config in configs.items():
            data = open_data(config.data.path)
            engine: Any = build_engine(config, world)
            engine.load(InitialValues(config), 0)
            b = config.batch
            batches = TrainBatches(
                data,
                order_of(config, data),
                sequences=b.sequences,
                micro=b.micro,
                seq_len=b.seq_len,
                rank=world.rank,
                world_size=world.size,
            )
            losses = [engine.train_step(batches.update(1), 1.0).loss.item()]
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                losses.append(engine.train_step(batches.update(2), 1.0).loss.item())
            found[name] = {
                "trained": [losses, state_digest(engine)],
                "zero": getattr(engine, "json", {}).get("zero_optimization", {}),
                "gathers": sum(row.count for row in seen.key_averages() if row.key == "c10d::_allgather_base_"),
            }
        (output / f"found_{world.rank}.json").write_text(json.dumps(found))
        world.barrier()


def trained(configs: dict[str, Config], output: Path) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    ranks.start(output, 2, train_each, configs, output).succeeded()
    return [json.loads((output / f"found_{rank}.json").read_text()) for rank in (0, 1)]


def test_buckets_by_rule_change_memory_alone(prepared: dict[str, Any], tmp_path: Path) -> None:
    """Sparing 2 GB of buffers would change the losses, or a run could not go on from its checkpoint bit for bit."""
    defaults = {
        "reduce_bucket_size": 500_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
    }
    cases = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
    configs = {
        f"{stage} {precision} {way}": changed(
            prepared,
            engine__kind="deepspeed",
            engine__zero_stage=stage,
            engine__precision=precision,
            engine__deepspeed={"zero_optimization": zero},
        )
        for stage, precision in cases
        for way, zero in (("rule", {}), ("defaults", defaults))
    }
    for found in trained(configs, tmp_path):
        for case in (f"{stage} {precision}" for stage, precision in cases):
            rule, default = found[f"{case} rule"], found[f"{case} defaults"]
            assert rule["trained"] == default["trained"], case
            assert rule["zero"]["reduce_bucket_size"] < 10**6
            assert default["zero"] == {**default["zero"], **defaults}


def test_weights_kept_gathered_change_memory_alone(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A block would compute with the weights of an update before."""
    cases = [(precision, shards) for precision in ("fp32", "bf16") for shards in (None, 1)]
    configs = {
        f"{precision} {shards} {freed}": changed(
            prepared,
            engine__kind="fsdp",
            engine__precision=precision,
            engine__shard_ranks=shards,
            engine__reshard_after_forward=freed,
            batch__micro=1,
        )
        for precision, shards in cases
        for freed in (True, False, None)
    }
    for found in trained(configs, tmp_path):
        for precision, shards in cases:
            freed, kept, by_rule = (found[f"{precision} {shards} {freed}"] for freed in (True, False, None))
            assert freed["trained"] == kept["trained"] == by_rule["trained"], f"{precision}, shards over {shards}"
            # Embedding, two blocks, norm with head. Of these each of four micro-batches frees the embedding and, after
            # both passes, the blocks, and then norm with head; the backward pass needs no embedding.
            wanted = (4 * 6, 4, 4) if shards is None else (0, 0, 0)
            assert (freed["gathers"], kept["gathers"], by_rule["gathers"]) == wanted


def test_weights_are_kept_gathered_where_they_are_small(prepared: dict[str, Any]) -> None:
    """A model that fits would no longer."""
    kept = {
        precision: [
            keeps_gathered(config)
            for size in (100, 1_000_000, 2_000_000)
            for config in [changed(prepared, model__ffn_size=size, engine__precision=precision)]
        ]
        for precision in ("fp32", "bf16")
    }
    assert kept == {"fp32": [True, False, False], "bf16": [True, True, False]}


def trace_on_two_nodes(*arguments: Any) -> None:
    """`trace` on four ranks, two on each node."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    trace(*arguments)


def share_nodes(output: Path, layouts: list[list[tuple[str, int, int]]]) -> None:
    """What each rank is told of worlds where it is number l of the n on a node: (node, n, l) by layout and rank."""
    said = []
    with open_world(60, collectives=True) as world:
        for layout in layouts:
            os.environ["SLURMD_NODENAME"], size, local_rank = layout[world.rank]
            try:
                said.append(str(_node_ranks(replace(world, local_size=size, local_rank=local_rank))))
            except ConfigError as error:
                said.append(str(error))
        (output / f"said_{world.rank}.json").write_text(json.dumps(said))
        world.barrier()


def test_a_copy_of_the_shards_on_each_node(prepared: dict[str, Any], tmp_path: Path) -> None:
    """Every gather would cross the slow links between nodes, or uneven nodes would share a copy across them."""
    config = changed(prepared, engine__kind="fsdp", engine__shard_ranks=2)
    numbered = traces(tmp_path / "number", 4, config, False, 3)
    by_node = changed(config.model_dump(mode="json"), engine__shard_ranks="node")
    assert traces(tmp_path / "node", 4, by_node, False, 3, run=trace_on_two_nodes) == numbered
    layouts = [
        [("a", 2, 0), ("a", 2, 1), ("b", 2, 0), ("b", 2, 1)],
        [("a", 3, 0), ("a", 3, 1), ("a", 3, 2), ("b", 1, 0)],
        [("a", 2, 0), ("b", 2, 0), ("a", 2, 1), ("b", 2, 1)],
    ]
    ranks.start(tmp_path / "said", 4, share_nodes, tmp_path / "said", layouts).succeeded()
    for rank in range(4):
        even, uneven, mixed = json.loads((tmp_path / "said" / f"said_{rank}.json").read_text())
        assert even == "2"
        assert "a has 3, b has 1" in uneven
        assert "rank 1 is number 0 of the 2 on b" in mixed


def test_compiled_blocks_train_as_eager_ones(prepared: dict[str, Any], tmp_path: Path) -> None:
    """torch.compile would change the model."""
    eager = traces(tmp_path / "eager", 1, changed(prepared), False, 4)
    compiled = traces(tmp_path / "compiled", 1, changed(prepared, engine__compile=True), False, 4)
    np.testing.assert_allclose(numbers(compiled, 0), numbers(eager, 0), rtol=0, atol=1e-5)


def score(config: Config, output: Path, micros: tuple[int, ...], sets: tuple[int, ...]) -> None:
    """Evaluate sets of so many sequences at several batch sizes, on every rank."""
    data = open_data(config.data.path)
    found = {}
    with open_world(60, collectives=True) as world:
        torch.set_float32_matmul_precision("medium")
        engine = build_engine(config, world)
        engine.load(InitialValues(config), 0)
        for sequences in sets:
            held_out = ValidationSet(
                "validation",
                data.train,
                data.token_bytes,
                seq_len=config.batch.seq_len,
                max_tokens=sequences * config.batch.seq_len - 5,
                eos_id=data.manifest.eos_id,
                document_mask=False,
                set_hash="x",
            )
            assert held_out.num_sequences == sequences
            for micro in micros:
                found[f"{sequences}/{micro}"] = evaluate(engine, held_out, micro)
        (output / f"scores_{world.rank}.json").write_text(json.dumps(found))
        world.barrier()


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_perplexity_does_not_depend_on_batch_size_or_ranks(prepared: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """Two people would measure two perplexities of one model, or validation would hang on a short rank."""
    results = []
    for count in (1, 2, 3):
        output = tmp_path / str(count)
        output.mkdir()
        config = changed(prepared, engine__kind=kind, batch__global_sequences=12)
        config = changed(config.model_dump(mode="json"), engine__zero_stage=3)
        sets = (1, 2, 3, 4, 37)
        ranks.start(output, count, score, config, output, (1, 3, 8), sets).succeeded()
        results += [json.loads((output / f"scores_{rank}.json").read_text()) for rank in range(count)]
    for sequences in sets:
        rows = [scores[f"{sequences}/{micro}"] for scores in results for micro in (1, 3, 8)]
        assert {row["num_tokens"] for row in rows} == {sequences * 32 - 5}
        for key in ("loss", "perplexity", "nats_per_byte"):
            np.testing.assert_allclose([row[key] for row in rows], rows[0][key], rtol=1e-9)


def test_the_optimizer_gets_the_schedule_and_logs_what_it_got(
    prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logged learning rate would be the one of another update than it was used in."""
    seen: list[set[float]] = []
    original: Callable[..., Any] = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *arguments: Any) -> Any:
        seen.append({float(group["lr"]) for group in self.param_groups})
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = changed(prepared)
    schedule = plan(config.schedule, config.batch.tokens)
    tokens = torch.arange(2 * 33).reshape(2, 33) % 300
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    with open_world(60, collectives=False) as world:
        engine = build_engine(config, world)
        engine.load(InitialValues(config), 0)
        logged = [engine.train_step([batch], schedule(k)).lr for k in range(1, 21)]
    assert seen == [{schedule.lr(k)} for k in range(1, 21)]
    assert logged == [schedule.lr(k) for k in range(1, 21)]


def test_norms_and_embeddings_do_not_decay(prepared: dict[str, Any]) -> None:
    """Weight decay would shrink what it should not."""
    config = changed(prepared)
    with open_world(60, collectives=False) as world:
        engine = build_engine(config, world)
        names = {id(p): name for name, p in engine.masters.items()}  # type: ignore[attr-defined]
        groups = engine.optimizer.param_groups  # type: ignore[attr-defined]
    plain = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert plain == {name for name in names.values() if "norm" in name or name == "embed.weight"}
    assert len(plain) + len(decayed) == len(names)


def test_garbage_is_collected_once_an_engine_is_built(prepared: dict[str, Any]) -> None:
    """A start that puts off collecting would train without it, and memory would grow."""
    gc.disable()
    try:
        with open_world(60, collectives=False) as world:
            build_engine(changed(prepared), world)
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
