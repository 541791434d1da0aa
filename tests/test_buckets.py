"""The sizes in DeepSpeed's JSON, for every preset and number of ranks, by what DeepSpeed does with them."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from llmtrain.config import Config
from llmtrain.data.batches import Batch
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.deepspeed import generated_json
from llmtrain.model.decoder import Block
from llmtrain.model.initial import parameter_shapes
from llmtrain.planner.memory import memory
from llmtrain.presets import PRESETS
from tests import ranks
from tests.ledger import Constant, run_config

COUNTS = (1, 8, 1024)


def zero(preset: str, stage: int, count: int, device: str = "cuda", **engine: Any) -> tuple[Config, dict[str, Any]]:
    """A run of a preset and the `zero_optimization` that DeepSpeed gets."""
    config = run_config(preset, {"kind": "deepspeed", "zero_stage": stage, **engine}, count, 1, 128)
    return config, generated_json(config, count, device)["zero_optimization"]


def sizes(config: Config) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in parameter_shapes(config.model).items()}


def fetched_ahead(queue: list[tuple[str, int]], most: int, persistent: int) -> list[str]:
    """What DeepSpeed's coordinator asks for: tensor by tensor until it has asked for `most` elements or more."""
    asked = 0
    names = []
    for name, count in queue:
        if asked >= most:
            break
        names.append(name)
        asked += count if count > persistent else 0  # what stays gathered is passed over
    return names


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_next_block_is_fetched_whole_while_this_one_computes(preset: str, count: int) -> None:
    """Every block would wait for most of its weights, or twice the memory planned would be gathered."""
    config, options = zero(preset, 3, count)
    elements = sizes(config)
    persistent = options["stage3_param_persistence_threshold"]
    prefetch, live = options["stage3_prefetch_bucket_size"], options["stage3_max_live_parameters"]
    blocks = [(name, size) for name, size in elements.items() if name.startswith("blocks.")]
    block = [(name, size) for name, size in blocks if name.startswith("blocks.1.")]
    following = blocks[len(block) :]
    assert fetched_ahead(following, prefetch, persistent) == [name for name, _ in block]
    assert prefetch <= sum(size for _, size in block) <= sum(elements.values())
    assert live >= 2 * sum(size for _, size in block)
    assert live >= sum(size for _, size in block) + elements["head.weight"]
    # A fetch ahead is cut to what may be gathered: with a block computed with, all of the next one is left.
    assert min(live - sum(size for _, size in block), prefetch) == prefetch


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_buckets_are_no_larger_than_the_model(preset: str, count: int, device: str) -> None:
    """A small model would need gigabytes of buffers, or DeepSpeed would overlap what it cannot overlap safely."""
    for stage, precision in ((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")):
        config, options = zero(preset, stage, count, device, precision=precision)
        elements = sizes(config)
        buffers = 2 if options.get("overlap_comm") else 1
        assert options["reduce_bucket_size"] <= sum(elements.values())
        if buffers == 2:  # else DeepSpeed frees a gradient that its other stream still reads
            assert options["reduce_bucket_size"] >= max(elements.values())
        bucketed = stage == 2 or (stage == 1 and precision == "fp32")
        assert (buffers == 2) == (device == "cuda" and count > 1 and bucketed)
        if buffers == 1:
            assert options["reduce_bucket_size"] == min(500_000_000, sum(elements.values()))


def test_nothing_overlaps_where_it_is_not_safe() -> None:
    """A gradient would be read after its memory was given away: training would go wrong now and then."""
    small = {"zero_optimization": {"reduce_bucket_size": 10_000_000}}
    assert "overlap_comm" not in zero("llama-7b", 2, 8, deepspeed=small)[1]
    assert zero("llama-7b", 2, 8, deepspeed={"zero_optimization": {"overlap_comm": False}})[1]["overlap_comm"] is False
    assert "overlap_comm" not in zero("llama-7b", 2, 8, **{"offload.optimizer": True})[1]
    assert "zero_optimization" in generated_json(zero("tiny", 0, 8)[0], 8, "cuda")


def test_the_second_buffer_is_planned() -> None:
    """A run that overlaps would not fit where its plan did."""
    asked = {"deepspeed": {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 500_000_000}}}
    [twice, once] = [
        memory(config, 8).moments["backward"]
        for config in (zero("llama-7b", 2, 8)[0], zero("llama-7b", 2, 8, **asked)[0])
    ]
    assert twice - once == 2 * 500_000_000


def fetches(options: list[dict[str, Any]], output: Path) -> None:
    """On every rank, for each set of options: elements of blocks gathered ahead, and only when their turn came."""
    found = []
    with open_world(120, collectives=True) as world:
        for asked in options:
            layout = {"kind": "deepspeed", "zero_stage": 3, "precision": "fp32", "deepspeed": asked}
            config = run_config("tiny", layout, world.size, 1, 32)
            engine: Any = build_engine(config, world)
            engine.load(Constant(), 0)
            counted = {"ahead": 0, "late": 0}
            coordinator = type(engine.engine.optimizer.parameter_offload.get_param_coordinator())
            name = f"_{coordinator.__name__}__all_gather_params"
            gather = getattr(coordinator, name)
            fetch = coordinator._fetch_sub_module_impl

            def fetching(self: Any, module: Any, *others: Any, fetch: Any = fetch, **named: Any) -> None:
                self.now = {id(p) for p in module.parameters()} if isinstance(module, Block) else set()
                fetch(self, module, *others, **named)

            def gathering(self: Any, params: Any, forward: bool, gather: Any = gather, counted: Any = counted) -> None:
                for p in params:
                    if p.ds_status.name == "NOT_AVAILABLE" and len(p.ds_shape) == 2:
                        counted["late" if id(p) in self.now else "ahead"] += p.ds_numel
                gather(self, params, forward)

            tokens = torch.ones((1, 32), dtype=torch.long)
            batches = [Batch(tokens, tokens)] * 2
            for _ in range(2):  # the order of modules is recorded
                engine.train_step(batches, 1.0)
            spied = {name: gathering, "_fetch_sub_module_impl": fetching}
            with mock.patch.multiple(coordinator, **spied):
                engine.train_step(batches, 1.0)
            found.append(counted)
        (output / f"fetches_{world.rank}.json").write_text(json.dumps(found))
        world.barrier()


def test_deepspeed_fetches_as_read(tmp_path: Path) -> None:
    """The sizes would fit a DeepSpeed of another time, and every block be waited for."""
    block = sum(count for name, count in sizes(zero("tiny", 3, 2)[0]).items() if name.startswith("blocks.0."))
    freed = {"stage3_max_reuse_distance": 0}
    asked = [{"zero_optimization": {**freed, **more}} for more in ({}, {"stage3_prefetch_bucket_size": block // 4})]
    ranks.start(tmp_path, 2, fetches, asked, tmp_path).succeeded()
    whole, quarter = json.loads((tmp_path / "fetches_0.json").read_text())
    assert whole["late"] == 0 < whole["ahead"]
    assert quarter["late"] > 4 * 2 * 2 * block / 3  # four blocks, two passes of two micro-batches
