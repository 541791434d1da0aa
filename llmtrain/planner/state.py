"""What does each engine hold of the weights, gradients and moments on one rank, and when?

Bytes by kind, on the device of the rank that holds most, at five moments of an update after the first: `always`, and
beside that at the end of the `forward` pass, at the start of the `backward` pass, when its end has `reduce`d the
gradients, and in the `update`. Where gradients are accumulated, those of earlier micro-batches are there in `forward`.

Read off `llmtrain/engines/` and, for ZeRO, DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`runtime/bf16_optimizer.py`); FSDP2 as of torch 2.13 (`distributed/fsdp/_fully_shard`). `tests/test_plan.py` compares
with every live tensor of real engines.

Letters: P parameters, R ranks, S ranks that share one copy, c bytes of the compute type, B elements of a bucket.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmtrain.config import Config
from llmtrain.errors import ConfigError
from llmtrain.model.buckets import keeps_gathered, zero_options
from llmtrain.model.initial import is_block_matrix, parameter_shapes

FP32 = 4
KINDS = ("weights", "masters", "moments", "gradients", "communication", "average", "activations", "logits", "workspace")
ALLREDUCE_ELEMENTS = 500_000_000  # DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE, of stage 0 and of 1 in bf16; not an option

NODE_RANKS = 8

Bytes = dict[str, int]


@dataclass(frozen=True)
class Holdings:
    """Bytes by kind. What a moment names comes on top of `always`; `host` is in the node's memory, for one rank."""

    always: Bytes
    forward: Bytes = field(default_factory=dict)
    backward: Bytes = field(default_factory=dict)
    reduce: Bytes = field(default_factory=dict)
    update: Bytes = field(default_factory=dict)
    host: Bytes = field(default_factory=dict)


def holdings(config: Config, ranks: int, device_type: str = "cuda") -> Holdings:
    """What the engine of `config` holds on one of `ranks` ranks, on "cuda" or "cpu"."""
    accumulates = config.batch.accumulation(ranks) > 1
    if config.engine.kind == "single":
        return _single(config, accumulates)
    if config.engine.kind == "fsdp":
        return _fsdp(config, ranks, accumulates)
    if config.optim.name != "adamw":
        raise ConfigError(f'optim.name "{config.optim.name}" runs on engine.kind single and fsdp, not on deepspeed')
    if config.engine.fp8 != "none":
        raise ConfigError(f'engine.fp8 "{config.engine.fp8}" runs on engine.kind single and fsdp, not on deepspeed')
    if config.engine.zero_stage == 0:
        return _zero0(config, accumulates)
    if config.engine.zero_stage == 3:
        return _zero3(config, ranks, device_type)
    if config.engine.zero_stage == 1 and config.engine.precision == "bf16" and not config.engine.offload.optimizer:
        return _zero1_bf16(config, ranks, accumulates)
    return _zero12(config, ranks, accumulates, device_type)


def copy_ranks(config: Config, ranks: int) -> int:
    """S of FSDP2. The plan does not know the nodes: it takes them for eight ranks each, or for four or two that fit."""
    shards = config.engine.shard_ranks
    return math.gcd(NODE_RANKS, ranks) if shards == "node" else shards or ranks


def compute_bytes(config: Config) -> int:
    """c: bytes of an element in the type that computes."""
    return 2 if config.engine.precision == "bf16" else FP32


def sizes(config: Config) -> dict[str, int]:
    """Elements of every parameter."""
    return {name: math.prod(shape) for name, shape in parameter_shapes(config.model).items()}


def moment_bytes(elements: dict[str, int], config: Config) -> int:
    """Of parameters with so many elements, as saved: two moments, and one of a matrix that Muon trains."""
    muon = config.optim.name == "muon"
    return FP32 * sum((1 if muon and is_block_matrix(name) else 2) * n for name, n in elements.items())


def kept_moment_bytes(elements: dict[str, int], config: Config) -> int:
    """The same on the device: under adamw8bit those of a matrix are a byte an element, and 4 bytes a block of 256."""
    if config.optim.name != "adamw8bit":
        return moment_bytes(elements, config)
    norms = {name: n for name, n in elements.items() if name.endswith("norm.weight")}
    matrices = sum(n + 4 * math.ceil(n / 256) for name, n in elements.items() if name not in norms)
    return 2 * matrices + moment_bytes(norms, config)


def _single(config: Config, accumulates: bool) -> Holdings:
    P, c = sum(sizes(config).values()), compute_bytes(config)
    moments = kept_moment_bytes(sizes(config), config)
    gradients = {"gradients": FP32 * P}
    return Holdings(
        always={"weights": c * P, "masters": FP32 * P if c < FP32 else 0, "moments": moments},
        forward=gradients if accumulates else {},
        backward=gradients if accumulates else {},
        reduce=gradients,
        update=gradients,
    )


def _fsdp(config: Config, ranks: int, accumulates: bool) -> Holdings:
    """fp32 shards of every parameter along its first dimension. In compute type there are, gathered, a block computed
    with and one fetched ahead, the embedding in its turn, and norm and head while the loss is made; of a tied head
    or whole copies all three all the time. What is reduced waits in fp32 for the next reduction.
    """
    S = copy_ranks(config, ranks)
    c = compute_bytes(config)
    shards = {
        name: math.ceil(shape[0] / S) * math.prod(shape[1:]) for name, shape in parameter_shapes(config.model).items()
    }
    shard = sum(shards.values())
    block = S * sum(size for name, size in shards.items() if name.startswith("blocks.0."))
    blocks = block * config.model.num_layers
    head = config.model.vocab_size * config.model.hidden_size
    whole = config.model.tie_embeddings or (S == 1 and ranks > 1)  # then all but the blocks is gathered as one
    last = 0 if whole else S * (shards["norm.weight"] + shards["head.weight"])
    first = S * shard - blocks - last
    keeps = keeps_gathered(config)
    copies = 2 if S > 1 else 1  # what is gathered, and what it is gathered into
    always = first if whole or keeps else 0
    pair = blocks if keeps else 2 * block  # computed with, and fetched ahead
    computing = pair + (copies - 1) * block
    heading = copies * last + (blocks if keeps else 0)
    gradients = {"gradients": FP32 * shard}
    late = config.engine.accumulation_sync == "last"  # then gradients are kept whole until the last micro-batch
    accumulated = FP32 * shard * (S if late else 1) if accumulates else 0
    return Holdings(
        always={"weights": FP32 * shard, "moments": kept_moment_bytes(shards, config)},
        forward={"gradients": accumulated, "communication": c * (always + max(computing, heading))},
        backward={
            "gradients": accumulated + (c * head if whole else 0) + c * block,
            "communication": c * (always + computing) + _reducing(block, S) + _reducing(max(block, last), S),
        },
        reduce={
            "gradients": FP32 * shard + c * first,
            "communication": (c * first if whole else 0) + _reducing(first, S) + (0 if whole else FP32 * block),
        },
        update=gradients,
    )


def _reducing(elements: int, ranks: int) -> int:
    """Bytes of a reduce-scatter in fp32: what goes in and what comes out."""
    return FP32 * elements + FP32 * elements // ranks


def _zero0(config: Config, accumulates: bool) -> Holdings:
    """Everything on every rank in fp32; bf16 is autocast, whose copies of the matrices live until the backward pass."""
    elements = sizes(config)
    P = sum(elements.values())
    autocast = 2 * sum(n for name, n in elements.items() if name.startswith("blocks.") and "norm" not in name)
    copies = {"workspace": autocast if config.engine.precision == "bf16" else 0}
    gradients = {"gradients": FP32 * P}
    flat = FP32 * _flattened(elements.values(), ALLREDUCE_ELEMENTS)
    return Holdings(
        always={"weights": FP32 * P, "moments": 2 * FP32 * P},
        forward={**(gradients if accumulates else {}), **copies},
        backward={**(gradients if accumulates else {}), **copies},
        reduce={**gradients, "communication": flat},
        update=gradients,
    )


def _zero1_bf16(config: Config, ranks: int, accumulates: bool) -> Holdings:
    """DeepSpeed's BF16_Optimizer: masters and moments sharded, fp32 gradients whole on every rank beside bf16 ones."""
    groups = [sum(group.values()) for group in _groups(config)]
    P, part = sum(groups), math.ceil(sum(groups) / ranks)
    gradients = {"gradients": 2 * P}
    return Holdings(
        always={"weights": 2 * P, "masters": FP32 * part, "moments": 2 * FP32 * part, "gradients": FP32 * P},
        forward=gradients if accumulates else {},
        backward=gradients if accumulates else {},
        reduce={**gradients, "communication": FP32 * _flattened(groups, ALLREDUCE_ELEMENTS)},
        update=gradients,
    )


def _zero12(config: Config, ranks: int, accumulates: bool, device_type: str) -> Holdings:
    """DeepSpeedZeroOptimizer: whole weights in compute type, everything else sharded, gradients reduced in buckets."""
    zero = zero_options(config, ranks, device_type)
    c = compute_bytes(config)
    groups = _groups(config)
    P = sum(sum(group.values()) for group in groups)
    part = math.ceil(P / ranks)
    bucket = int(zero["reduce_bucket_size"])
    reduced = min(bucket, P)
    sharded_gradients = config.engine.zero_stage == 2
    offload = config.engine.offload.optimizer
    wide = c < FP32 and not sharded_gradients  # stage 1 with the optimizer offloaded accumulates beside the parameters
    buffers = (FP32 if wide else c) * bucket * (2 if zero.get("overlap_comm") else 1)
    # Reducing a bucket joins its pieces, where there are several, and makes an fp32 copy of what is not fp32.
    joined = 0 if ranks == 1 and c == FP32 else (FP32 if wide else c) * reduced
    reducing = buffers + joined + (FP32 * reduced if c < FP32 and not wide else 0)
    whole = FP32 * P  # gradients at the parameters, until the last micro-batch reduces them
    owned = FP32 * max(sum(_touching(group, ranks, rank) for group in groups) for rank in range(ranks))
    if c < FP32:
        owned = FP32 * part
    state = {"masters": FP32 * part, "moments": 2 * FP32 * part}
    if offload:
        # Reduced gradients are kept in fp32 on the device where they were not so before, else on the host.
        largest = max(max(group.values()) for group in groups)
        held = {"gradients": (FP32 * part if c < FP32 else 0) if sharded_gradients else whole}
        last = {"gradients": FP32 * part if c < FP32 else 0}
        return Holdings(
            always={"weights": c * P, "workspace": c * largest},
            forward=held if accumulates else {},
            backward={**held, "communication": reducing if sharded_gradients else buffers},
            reduce={"gradients": max(last["gradients"], held["gradients"]), "communication": reducing},
            update=last,
            host={
                **state,
                "gradients": FP32 * part + (0 if c < FP32 else owned),
                "communication": c * (part + largest),
            },
        )
    kept = owned if sharded_gradients else whole
    flat = FP32 * math.ceil(max(sum(group.values()) for group in groups) / ranks) if c == FP32 else 0
    late = {"gradients": owned + (0 if sharded_gradients else FP32 * (P - reduced)), "communication": reducing}
    return Holdings(
        always={"weights": c * P, **state},
        forward={"gradients": kept, "communication": 0 if sharded_gradients else buffers} if accumulates else {},
        backward={
            "gradients": kept if accumulates or sharded_gradients else 0,
            "communication": reducing if sharded_gradients else buffers,
        },
        reduce=late,
        update={"gradients": owned + flat},
    )


def _zero3(config: Config, ranks: int, device_type: str) -> Holdings:
    """Everything sharded. Parameters below a threshold stay gathered, others while they are soon used again."""
    zero = zero_options(config, ranks, device_type)
    c = compute_bytes(config)
    elements = sizes(config)
    parts = {name: math.ceil(n / ranks) for name, n in elements.items()}
    P, part = sum(elements.values()), sum(parts.values())
    bucket = int(zero["reduce_bucket_size"])
    small = int(zero["stage3_param_persistence_threshold"])
    live = int(zero["stage3_max_live_parameters"]) + int(zero["stage3_prefetch_bucket_size"])
    subgroup = int(zero.get("sub_group_size", 10**9))
    persistent = sum(n for n in elements.values() if n <= small) if ranks > 1 else 0
    gathered = c * min(P - persistent, live) if ranks > 1 else 0
    reduced = min(bucket, P)
    reducing = {"communication": gathered + FP32 * (reduced + reduced // ranks)}
    flat = min(max(sum(parts[name] for name in group) for group in _groups(config)), subgroup)
    state = {"masters": FP32 * part, "moments": 2 * FP32 * part, "gradients": FP32 * part}
    weights = {"weights": c * part}
    offload = config.engine.offload
    on_device = {"weights": c * persistent, "communication": FP32 * bucket}
    host: Bytes = {}
    if offload.parameters:
        host = {**weights}
    else:
        on_device["weights"] += weights["weights"]
    if offload.optimizer:
        host = {**host, **state, "gradients": 2 * FP32 * part}
    else:
        on_device = {**on_device, **state}
    update = {} if offload.optimizer else {"gradients": FP32 * flat}
    return Holdings(
        always=on_device,
        forward={"communication": gathered},
        backward=reducing,
        reduce=reducing,
        update=update,
        host=host,
    )


def _groups(config: Config) -> list[dict[str, int]]:
    """Elements of the parameters in each group of the optimizer, in its order: the blocks' matrices first."""
    optim = config.optim
    factors = optim.lr_factors.model_dump()
    grouped: dict[tuple[bool, float], dict[str, int]] = {(True, 1.0): {}}
    for name, count in sizes(config).items():
        kind = "norm" if name.endswith("norm.weight") else name.removesuffix(".weight")
        decays = {"norm": optim.decay_norms, "embed": optim.decay_embeddings}.get(kind, True)
        grouped.setdefault((decays, factors.get(kind, 1.0)), {})[name] = count
    return [group for group in grouped.values() if group]


def _touching(group: dict[str, int], ranks: int, rank: int) -> int:
    """Elements of the parameters of which some lie in a rank's equal part of a flat group."""
    part = math.ceil(sum(group.values()) / ranks)
    start, stop, at, found = rank * part, (rank + 1) * part, 0, 0
    for count in group.values():
        if at < stop and at + count > start:
            found += count
        at += count
    return found


def _flattened(tensors: Iterable[int], limit: int) -> int:
    """Elements of the largest joined copy when tensors are reduced in turn, each time that `limit` is passed.

    One tensor alone needs no copy.
    """
    largest, pending = 0, []
    for count in tensors:
        pending.append(count)
        if sum(pending) > limit:
            largest = max(largest, sum(pending) if len(pending) > 1 else 0)
            pending = []
    return max(largest, sum(pending) if len(pending) > 1 else 0)
