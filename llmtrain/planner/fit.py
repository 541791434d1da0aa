"""What fits, and what is the cheapest change that makes a run fit?

Every answer is checked by the arithmetic that said no: a change is offered only where the changed config fits. The
order is what a change costs: nothing but smaller products, a forward pass again, more communication, more GPUs, and
last the slow way to host memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmtrain.config import Config
from llmtrain.errors import ConfigError
from llmtrain.planner.gpus import Gpu
from llmtrain.planner.memory import memory
from llmtrain.planner.state import copy_ranks

MOST_RANKS = 4096
Tried = tuple[str, dict[str, Any], int]
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "fsdp": {"kind": "fsdp", "shard_ranks": None},
    "zero 0": {"kind": "deepspeed", "zero_stage": 0},
    "zero 1": {"kind": "deepspeed", "zero_stage": 1},
    "zero 2": {"kind": "deepspeed", "zero_stage": 2},
    "zero 3": {"kind": "deepspeed", "zero_stage": 3},
    "zero 2, optimizer on the host": {"kind": "deepspeed", "zero_stage": 2, "offload.optimizer": True},
    "zero 3, all on the host": {
        "kind": "deepspeed",
        "zero_stage": 3,
        "offload.optimizer": True,
        "offload.parameters": True,
    },
}
_NO_OFFLOAD = {"offload.optimizer": False, "offload.parameters": False}


@dataclass(frozen=True)
class Change:
    """A change after which the run fits: in words, as overrides of the config, on so many ranks, and what it needs."""

    words: str
    overrides: list[str]
    ranks: int
    micro: int
    total: int  # bytes on a rank


@dataclass(frozen=True)
class Layout:
    """One way to lay the run over ranks. What is None is not possible on these GPUs."""

    name: str
    total: int | None  # bytes on a rank with the config's micro-batch on the ranks asked for
    largest_micro: int | None  # sequences, on the ranks asked for
    fewest_ranks: int | None  # a power of two, with a micro-batch of one sequence


def changed(config: Config, engine: dict[str, Any], micro: int | None = None) -> Config:
    """`config` with other engine fields (`offload.optimizer` is one of the section below) and micro-batch."""
    top = {key: value for key, value in engine.items() if "." not in key}
    offload = {key.partition(".")[2]: value for key, value in engine.items() if "." in key}
    top["offload"] = config.engine.offload.model_copy(update=offload)
    update: dict[str, Any] = {"engine": config.engine.model_copy(update=top)}
    if micro is not None:
        update["batch"] = config.batch.model_copy(update={"micro": micro})
    return config.model_copy(update=update)


def needs(config: Config, ranks: int) -> int | None:
    """Bytes on a rank, or None where so many ranks cannot run the config."""
    try:
        return memory(config, ranks).total
    except ConfigError:
        return None


def largest_micro(config: Config, ranks: int, gpu: Gpu, at_most: int | None = None) -> int | None:
    """The largest micro-batch that fits and leaves the global batch as it is."""
    if config.batch.sequences % ranks:
        return None
    share = config.batch.sequences // ranks
    for micro in range(min(share, at_most or share), 0, -1):
        if share % micro == 0:
            total = needs(changed(config, {}, micro), ranks)
            if total is not None and total <= gpu.usable:
                return micro
    return None


def layouts(config: Config, ranks: int, gpu: Gpu) -> list[Layout]:
    """Every engine and stage, on `ranks` ranks and on as few as can be."""
    found = []
    for name, engine in LAYOUTS.items():
        asked = changed(config, {**_NO_OFFLOAD, **engine})
        counts = [1] if name == "single" else _powers(MOST_RANKS)
        fewest = next((n for n in counts if _fits(changed(asked, {}, 1), n, gpu)), None)
        found.append(Layout(name, needs(asked, ranks), largest_micro(asked, ranks, gpu), fewest))
    return found


def changes(config: Config, ranks: int, gpu: Gpu) -> list[Change]:
    """What makes a config fit that does not, the cheapest first; empty where nothing here does."""
    kinds = (_on_these(config, ranks), _on_more(config, ranks), _on_the_host(config, ranks))
    found = [[made for tried in kind if (made := _made(config, gpu, *tried)) is not None] for kind in kinds]
    return [*found[0], *found[1][:1], *found[2]]


def _made(config: Config, gpu: Gpu, words: str, engine: dict[str, Any], ranks: int) -> Change | None:
    """The change with the largest micro-batch that fits, none larger than the config's."""
    asked = changed(config, engine)
    micro = largest_micro(asked, ranks, gpu, at_most=config.batch.micro)
    if micro is None:
        return None
    total = needs(changed(asked, {}, micro), ranks)
    assert total is not None
    overrides = [f"engine.{key}={written(value)}" for key, value in engine.items()]
    if micro != config.batch.micro:
        overrides.append(f"batch.micro={micro}")
        words = ", ".join(filter(None, (words, f"micro-batches of {micro}")))
    return Change(words, overrides, ranks, micro, total)


def _on_these(config: Config, ranks: int) -> Iterator[Tried]:
    """A smaller micro-batch, then recomputing, then sharding more."""
    engine = config.engine
    yield "", {}, ranks
    if _recomputing(config):
        yield "recompute every block", _recomputing(config), ranks
    sharded: list[tuple[str, dict[str, Any]]] = []
    if engine.kind == "deepspeed":
        stages = range(engine.zero_stage + 1, 4)
        sharded += [(f"ZeRO stage {stage}", {"zero_stage": stage}) for stage in stages]
    if engine.kind != "fsdp":
        sharded.append(("FSDP2", LAYOUTS["fsdp"]))
    elif copy_ranks(config, ranks) < ranks:
        sharded.append(("one copy over all ranks", {"shard_ranks": None}))
    for words, change in sharded:
        yield words, change, ranks
        if _recomputing(config):
            yield f"{words}, recompute every block", {**change, **_recomputing(config)}, ranks


def _on_more(config: Config, ranks: int) -> Iterator[Tried]:
    """The same on more GPUs."""
    widest = LAYOUTS["fsdp"] if config.engine.kind == "single" else {}
    for count in _powers(MOST_RANKS):
        if count > ranks:
            yield f"{count} GPUs", widest, count
            if _recomputing(config):
                yield f"{count} GPUs, recompute every block", {**widest, **_recomputing(config)}, count


def _on_the_host(config: Config, ranks: int) -> Iterator[Tried]:
    """State in the node's memory, with every block recomputed."""
    for name in ("zero 2, optimizer on the host", "zero 3, all on the host"):
        yield name, {**LAYOUTS[name], **_recomputing(config)}, ranks


def _recomputing(config: Config) -> dict[str, Any]:
    """The change that recomputes every block, empty where that is so already."""
    every = config.engine.activation_checkpointing == "all"
    return {} if every else {"activation_checkpointing": "all"}


def _fits(config: Config, ranks: int, gpu: Gpu) -> bool:
    total = needs(config, ranks)
    return total is not None and total <= gpu.usable


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def written(value: Any) -> str:
    """A value as it stands in an override of the config."""
    return value if isinstance(value, str) else json.dumps(value)
