"""FSDP2: parameters, gradients and moments sharded over the ranks, each block gathered when it is needed.

`fully_shard` for each block, for the embedding, and for the last norm and the head together. A tied head is the
embedding's, and where every rank has a whole copy nothing is gathered: there these three are one. fp32 sharded
parameters are the masters; compute in bf16 where asked; gradients are reduced in fp32 and accumulate there. With
`engine.shard_ranks` the ranks form a mesh of copies, each sharded over so many ranks, or over those of a node (HSDP).
Zhao 2023, arXiv:2304.11277, and the documentation of torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmtrain.config import Config
from llmtrain.data.batches import Batch
from llmtrain.distributed import World, node_name
from llmtrain.engines.base import (
    WEIGHT,
    FlatState,
    LearningRate,
    Phase,
    Slice,
    StateSource,
    StepStats,
    count_valid,
    details,
    fill,
    flattened,
    inference,
    moments,
    prepare_blocks,
    score,
    start_moments,
    summed,
    unmarked,
)
from llmtrain.engines.fp8 import use_fp8
from llmtrain.engines.muon import ShardedMuon
from llmtrain.engines.optimizers import build_optimizer
from llmtrain.errors import ConfigError
from llmtrain.model.buckets import keeps_gathered
from llmtrain.model.decoder import Decoder


class FsdpEngine:
    """A decoder sharded with FSDP2."""

    def __init__(self, config: Config, world: World, phase: Phase = unmarked) -> None:
        self.world = world
        self.phase = phase
        self.clip = config.optim.clip
        self.rate = LearningRate.of(config)
        self.precision = config.engine.precision
        self.reduces_every = config.engine.accumulation_sync == "every" or config.batch.accumulation(world.size) == 1
        self.mesh = _mesh(config, world)
        with torch.device("meta"):
            model = Decoder(config.model)
        use_fp8(model, config, world.device)
        prepare_blocks(model, config, world.device)
        compute = torch.bfloat16 if self.precision == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        self.keeps = keeps_gathered(config)
        in_order: list[torch.nn.Module] = [*model.blocks]
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=not self.keeps)
        if not config.model.tie_embeddings and not (self.mesh.ndim == 2 and self.mesh.size(-1) == 1):
            fully_shard(model.embed, mesh=self.mesh, mp_policy=policy, reshard_after_forward=not self.keeps)
            assert isinstance(model.embed, FSDPModule)
            model.embed.set_unshard_in_backward(False)  # where a gradient goes does not depend on the rows
            fully_shard([model.norm, model.head], mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
            in_order = [model.embed, *model.blocks, model.norm]
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        for part, following in pairwise(in_order):  # gathered before this one's kernels are started, not after
            assert isinstance(part, FSDPModule) and isinstance(following, FSDPModule)
            part.set_modules_to_forward_prefetch([following])
        self.model = model.to_empty(device=world.device)
        self.optimizer = build_optimizer(self.model.named_parameters(), config.optim, ShardedMuon)
        self.details = details(config, world.device)
        self.updates = 0

    def train_step(
        self, micro_batches: Sequence[Batch], lr_multiplier: float, decay_multiplier: float = 1.0
    ) -> StepStats:
        valid = count_valid(self.world, micro_batches)
        nats = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(micro_batches, start=1):
            self._set_backward(last=index == len(micro_batches))
            batch = batch.to(self.world.device)
            with self.phase("forward"):
                loss = self.model(batch.tokens, batch.targets, batch.document_ids)
            # FSDP2 averages gradients over the ranks, so the sum over them needs this factor.
            with self.phase("backward"):
                (loss * (self.world.size / valid)).backward()
            nats += loss.detach()
        self.rate.write(self.optimizer, lr_multiplier, decay_multiplier)
        with self.phase("optimizer"):
            parameters = list(self.model.parameters())
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.updates += 1
        return StepStats(summed(self.world, nats) / valid, norm, *self.rate.read(self.optimizer))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with inference(self.model):
            yield
            self._free()

    def nats(self, batch: Batch) -> Tensor:
        return score(self.model, batch, self.world.device)

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens.to(self.world.device))
        return logits

    def state(self) -> FlatState:
        slices = []
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor)
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            row = parameter.numel() // parameter.shape[0]
            start = min(offset[0], parameter.shape[0]) * row if shape[0] else 0
            held = {WEIGHT: parameter, **moments(self.optimizer.state[parameter])}
            tensors = flattened(held, _local)
            slices.append(Slice(name, start, start + shape[0] * row, parameter.numel(), tensors))
        if self.mesh.ndim == 1:
            return FlatState(slices, self.updates)
        return FlatState(slices, self.updates, self.mesh.get_local_rank("replicate"), self.mesh.size(0))

    def load(self, source: StateSource, update: int) -> None:
        start_moments(self.optimizer, self.model.parameters(), update)
        self.updates = update
        fill(self.state().slices, source)
        self._free()

    def describe(self) -> str:
        shards = self.mesh.size(-1)
        copies = self.mesh.size(0) if self.mesh.ndim == 2 else 1
        kept = (
            "" if self.reduces_every else f", whole fp32 gradients between micro-batches: {self._whole_gib():.2f} GiB"
        )
        gathered = ", weights gathered once an update" if self.keeps else ""
        return (
            f"FSDP2 over {self.world.size} ranks ({copies} x {shards} shards), {self.precision} compute, "
            f"fp32 masters, moments, accumulation and reduction{gathered}{kept}{self.details}"
        )

    def _whole_gib(self) -> float:
        """What `accumulation_sync: last` keeps on a rank: the gradients of all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters()) * 4 / 2**30

    def _set_backward(self, last: bool) -> None:
        """What the next backward pass does: reduce its gradients or keep them, and free gathered weights or keep them.

        Copies of shards (HSDP) always wait for the last: until then only shards are reduced, which costs no memory.
        """
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last or self.reduces_every)
        self.model.set_reshard_after_backward(last or not self.keeps)
        if self.mesh.ndim == 2:
            self.model.set_requires_all_reduce(last)

    def _free(self) -> None:
        """Free what is still gathered: it would outlive a change of the shards, and be computed with."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _mesh(config: Config, world: World) -> DeviceMesh:
    shards = config.engine.shard_ranks
    if shards == "node":
        shards = _node_ranks(world)
    if shards is None or shards == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    if world.size % shards:
        raise ConfigError(f"engine.shard_ranks {shards} does not divide the {world.size} ranks")
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def _node_ranks(world: World) -> int:
    """How many ranks share a node. Collective. Raises ConfigError where nodes are not rows of as many ranks each."""
    told = world.gather_text(f"{node_name()} {world.local_size} {world.local_rank}")
    nodes = [(name, int(size), int(local_rank)) for name, size, local_rank in (text.rsplit(" ", 2) for text in told)]
    sizes = {size for _, size, _ in nodes}
    if len(sizes) > 1:
        each = dict.fromkeys((name, size) for name, size, _ in nodes)
        counts = ", ".join(f"{name} has {size}" for name, size in each)
        raise ConfigError(
            f'engine.shard_ranks "node" wants as many ranks on every node, but {counts}: start as many on each, or '
            "write a number"
        )
    size = sizes.pop()
    for rank, (name, _, local_rank) in enumerate(nodes):
        if rank % size != local_rank:
            raise ConfigError(
                f'engine.shard_ranks "node" wants the ranks of a node one after another, but rank {rank} is number '
                f"{local_rank} of the {size} on {name}: start them node by node (srun --distribution=block)"
            )
    return size


def _local(tensor: Any) -> Tensor:
    """The flat elements of a DTensor on this rank, as a view."""
    local: Tensor = tensor.detach().to_local()
    return local.view(-1)
