"""DeepSpeed ZeRO: what stage 0 replicates, 1 to 3 shard more and more of (Rajbhandari 2020, arXiv:1910.02054).

DeepSpeed gets our optimizer and nothing else to decide: no scheduler, no loader. Its JSON is generated from the config,
with fp32 gradient accumulation and reduction, which it does not do by itself. The learning rate is written into the
innermost optimizer before the update. State is read and written in place through the fragments it exposes.

Stage 0 in bf16 is the exception: there DeepSpeed cannot accumulate in fp32 over bf16 parameters, so the parameters stay
fp32 and the forward pass runs under autocast, which the head leaves.
"""

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
from torch import Tensor

from llmtrain.config import Config
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.engines.base import (
    EXP_AVG,
    EXP_AVG_SQ,
    WEIGHT,
    FlatState,
    LearningRate,
    Phase,
    Slice,
    StateSource,
    StepStats,
    build_adamw,
    count_valid,
    details,
    fill,
    inference,
    prepare_blocks,
    score,
    start_moments,
    summed,
    unmarked,
)
from llmtrain.model.buckets import zero_options
from llmtrain.model.decoder import Block, Decoder


def generated_json(config: Config, world_size: int, device_type: str) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, on "cuda" or "cpu". The user's `engine.deepspeed` is merged in last."""
    engine = config.engine
    accumulation = config.batch.accumulation(world_size)
    low_precision = engine.precision == "bf16" and engine.zero_stage > 0
    zero: dict[str, Any] = {"stage": engine.zero_stage, **zero_options(config, world_size, device_type)}
    if engine.offload.optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload.parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    generated = {
        "train_batch_size": config.batch.sequences,
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip or 0.0,
        "bf16": {"enabled": low_precision},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return _merged(generated, engine.deepspeed)


class DeepSpeedEngine:
    """A decoder trained by a DeepSpeed engine."""

    def __init__(self, config: Config, world: World, phase: Phase = unmarked) -> None:
        deepspeed = _import_deepspeed(world)
        self.world = world
        self.phase = phase
        self.stage = config.engine.zero_stage
        self.precision = config.engine.precision
        self.rate = LearningRate.of(config)
        self.json = generated_json(config, world.size, world.device.type)
        self.details = details(config, world.device)
        self.autocast = self.stage == 0 and self.precision == "bf16"
        building: AbstractContextManager[Any] = torch.device("meta")
        if self.stage == 3:
            building = deepspeed.zero.Init(config_dict_or_path=self.json)
        with building:
            model = Decoder(config.model)
        if self.stage < 3:
            model = model.to_empty(device=world.device)
        if self.stage == 3:  # a block is gathered as one, outside of what is compiled and computed again
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        prepare_blocks(model, config, world.device)
        optimizer = build_adamw(model.named_parameters(), config.optim)
        with _local_rank_of(world.device), redirect_stdout(io.StringIO()):  # it prints its memory use while it builds
            self.engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.json)
        self.updates = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The innermost optimizer, the one that makes the update, looked up afresh."""
        found = self.engine.optimizer
        while hasattr(found, "optimizer"):
            found = found.optimizer
        assert isinstance(found, torch.optim.Optimizer)
        return found

    def train_step(
        self, micro_batches: Sequence[Batch], lr_multiplier: float, decay_multiplier: float = 1.0
    ) -> StepStats:
        valid = count_valid(self.world, micro_batches)
        nats = torch.zeros((), device=self.world.device)
        self.rate.write(self.optimizer, lr_multiplier, decay_multiplier)
        for batch in micro_batches:
            batch = batch.to(self.world.device)
            with self.phase("forward"), self._computing():
                loss = self.engine(batch.tokens, batch.targets, batch.document_ids)
            # DeepSpeed averages gradients over the ranks, so the sum over them needs this factor.
            with self.phase("backward"):
                self.engine.backward(loss * (self.world.size / valid), scale_wrt_gas=False)
            with self.phase("optimizer"):
                norm = self._replicated_norm() if self.stage == 0 else None
                self.engine.step()
            nats += loss.detach()
        self.updates += 1
        norm = torch.as_tensor(self.engine.get_global_grad_norm() if norm is None else norm, dtype=torch.float32)
        return StepStats(summed(self.world, nats) / valid, norm, *self.rate.read(self.optimizer))

    def evaluating(self) -> AbstractContextManager[None]:
        return inference(self.engine)

    def nats(self, batch: Batch) -> Tensor:
        with self._computing():
            return score(self.engine, batch, self.world.device)

    def logits(self, tokens: Tensor) -> Tensor:
        with self._computing():
            logits: Tensor = self.engine(tokens.to(self.world.device))
        return logits

    def state(self) -> FlatState:
        parameters = list(self.engine.module.named_parameters())
        if self.stage == 0:
            slices = [_whole(name, p, self.optimizer.state[p]) for name, p in parameters]
            return FlatState(slices, self.updates, copy=self.world.rank, copies=self.world.size)
        if self.stage == 3:
            slices = [_z3_slice(name, p, self.world.rank) for name, p in parameters]
        else:
            slices = [_fragment(name, p, self.optimizer) for name, p in parameters]
        return FlatState(slices, self.updates)

    def load(self, source: StateSource, update: int) -> None:
        if self.stage == 3:
            masters = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        start_moments(self.optimizer, masters, update)
        self.updates = update
        self.engine.global_steps = update
        fill(self.state().slices, source)
        self._publish()

    def describe(self) -> str:
        compute = f"{self.precision} compute" + (" (autocast)" if self.autocast else "")
        return (
            f"DeepSpeed ZeRO-{self.stage} over {self.world.size} ranks, {compute}, "
            f"fp32 masters, moments, accumulation and reduction{self.details}\nDeepSpeed JSON {json.dumps(self.json)}"
        )

    def _replicated_norm(self) -> Tensor | None:
        """The gradient norm of stage 0, which DeepSpeed does not tell; once gradients are complete, before the clip."""
        if not self.engine.is_gradient_accumulation_boundary():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    def _computing(self) -> AbstractContextManager[Any]:
        if self.autocast:
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return nullcontext()

    def _publish(self) -> None:
        """Bring the loaded masters into the parameters that compute, on every rank."""
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            zero.checkpoint_event_prologue()  # lets go of every gathered weight
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, on this device, quiet, with the variables it reads even where no launcher set them."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Unset, it asks `numactl` for the number of ranks of this node, at every micro-batch.
        os.environ.setdefault("LOCAL_SIZE", str(world.local_size))
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    import deepspeed
    from deepspeed.utils import logger

    _import_muon_uncompiled()

    logger.setLevel(logging.WARNING)
    # It calls collectives by names that newer versions of torch deprecate.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*")
    # Its extensions are not used here. Asked which of them it could build, it would run compilers; and on a CPU it
    # would build one for inference when first started, behind a lock that a kill leaves there.
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(("deepspeed_shm_comm", "deepspeed_not_implemented"), False)
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


@contextmanager
def _local_rank_of(device: torch.device) -> Iterator[None]:
    """While it builds, DeepSpeed takes the GPU that LOCAL_RANK names, not so where a rank sees its own alone."""
    local_rank = os.environ["LOCAL_RANK"]
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = local_rank


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, as `initialize` will, without the compiler that it loads for it, which takes seconds.

    Nothing calls it here: Muon is refused under this engine.
    """
    compiler = torch.compile
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compiler


def _merged(generated: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`extra` laid over `generated`, section by section."""
    merged = dict(generated)
    for key, value in extra.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _whole(name: str, parameter: Tensor, moments: dict[str, Tensor]) -> Slice:
    """Stage 0: every rank holds every element."""
    tensors = {
        WEIGHT: parameter.detach().view(-1),
        EXP_AVG: moments[EXP_AVG].view(-1),
        EXP_AVG_SQ: moments[EXP_AVG_SQ].view(-1),
    }
    return Slice(name, 0, parameter.numel(), parameter.numel(), tensors)


def _fragment(name: str, parameter: Any, optimizer: torch.optim.Optimizer) -> Slice:
    """Stages 1 and 2: the part of a parameter that falls into this rank's partition of its flat group."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return _nothing(name, parameter.numel())
    flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
    here = mapping.hp_fragment_address
    start = mapping.lp_fragment_address.start
    return Slice(name, start, start + here.numel, parameter.numel(), _views(flat, optimizer, here.start, here.numel))


def _z3_slice(name: str, parameter: Any, rank: int) -> Slice:
    """Stage 3: this rank's equal part of a parameter, without the padding at its end."""
    zero = parameter._z3_optimizer
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    part = parameter.partition_numel()
    start = min(rank * part, parameter.ds_numel)
    stop = min(start + part, parameter.ds_numel)
    if start == stop:
        return _nothing(name, parameter.ds_numel)
    flat = zero.fp32_partitioned_groups_flat[group]
    return Slice(name, start, stop, parameter.ds_numel, _views(flat, zero.optimizer, offset, stop - start))


def _views(flat: Tensor, optimizer: torch.optim.Optimizer, offset: int, count: int) -> dict[str, Tensor]:
    moments = optimizer.state[flat]
    return {
        WEIGHT: flat.detach().narrow(0, offset, count),
        EXP_AVG: moments[EXP_AVG].narrow(0, offset, count),
        EXP_AVG_SQ: moments[EXP_AVG_SQ].narrow(0, offset, count),
    }


def _nothing(name: str, numel: int) -> Slice:
    """A parameter of which this rank owns no element."""
    return Slice(name, 0, 0, numel, {})
