"""One device, nothing sharded: the engine that is read first, and the reference the others are tested against.

In bf16 the module computes in bf16 while fp32 masters live beside it: each micro-batch's gradients are added to the
masters' fp32 gradients as they appear, the update is made on the masters, and the module gets their rounded copy. Where
gradients accumulate and the device can, the blocks' products add to those fp32 gradients themselves
(`llmtrain.model.projection`): those live as long as the engine and are set to zero after each update.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from llmtrain.config import Config
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.engines.base import (
    WEIGHT,
    FlatState,
    LearningRate,
    Phase,
    Slice,
    StateSource,
    StepStats,
    details,
    fill,
    flattened,
    inference,
    moments,
    prepare_blocks,
    score,
    start_moments,
    unmarked,
)
from llmtrain.engines.fp8 import use_fp8
from llmtrain.engines.optimizers import build_optimizer
from llmtrain.errors import ConfigError
from llmtrain.model.decoder import Decoder
from llmtrain.model.projection import Linear, sums_in_products


class SingleEngine:
    """The whole model on one device."""

    def __init__(self, config: Config, world: World, phase: Phase = unmarked) -> None:
        if world.size != 1:
            raise ConfigError(
                f'engine.kind "single" runs on one rank, but there are {world.size}: '
                "use --set engine.kind=fsdp or --set engine.kind=deepspeed"
            )
        self.world = world
        self.phase = phase
        self.clip = config.optim.clip
        self.rate = LearningRate.of(config)
        with torch.device("meta"):
            model = Decoder(config.model)
        use_fp8(model, config, world.device)
        self.model = model.to_empty(device=world.device)
        self.masters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.sums: dict[str, Tensor] = {}  # gradients that products add to, by name
        self.low_precision = config.engine.precision == "bf16"
        if self.low_precision:
            self.masters = {name: torch.empty_like(p, requires_grad=True) for name, p in self.masters.items()}
            self.model.to(torch.bfloat16)
            accumulates = config.batch.accumulation(1) > 1
            self._fold_gradients(in_products=accumulates and sums_in_products(world.device))
        prepare_blocks(self.model, config, world.device)
        self.optimizer = build_optimizer(self.masters.items(), config.optim)
        self.details = details(config, world.device)
        self.updates = 0

    def train_step(
        self, micro_batches: Sequence[Batch], lr_multiplier: float, decay_multiplier: float = 1.0
    ) -> StepStats:
        valid = max(1, sum(batch.num_valid for batch in micro_batches))
        nats = torch.zeros((), device=self.world.device)
        for batch in micro_batches:
            batch = batch.to(self.world.device)
            with self.phase("forward"):
                loss = self.model(batch.tokens, batch.targets, batch.document_ids)
            with self.phase("backward"):
                (loss / valid).backward()
            nats += loss.detach()
        self.rate.write(self.optimizer, lr_multiplier, decay_multiplier)
        with self.phase("optimizer"):
            gradients = [master.grad for master in self.masters.values() if master.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), self.clip, norm)
            self.optimizer.step()
            self._clear_gradients()
            self._publish()
        self.updates += 1
        return StepStats(nats / valid, norm, *self.rate.read(self.optimizer))

    def evaluating(self) -> AbstractContextManager[None]:
        return inference(self.model)

    def nats(self, batch: Batch) -> Tensor:
        return score(self.model, batch, self.world.device)

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens.to(self.world.device))
        return logits

    def state(self) -> FlatState:
        slices = []
        for name, master in self.masters.items():
            held = {WEIGHT: master.detach(), **moments(self.optimizer.state[master])}
            tensors = flattened(held, lambda tensor: tensor.view(-1))
            slices.append(Slice(name, 0, master.numel(), master.numel(), tensors))
        return FlatState(slices, self.updates)

    def load(self, source: StateSource, update: int) -> None:
        start_moments(self.optimizer, self.masters.values(), update)
        self.updates = update
        fill(self.state().slices, source)
        self._publish()

    def describe(self) -> str:
        compute = "bf16 compute, fp32 masters" if self.low_precision else "fp32"
        return f"single device {self.world.device}, {compute}, fp32 gradients and moments{self.details}"

    def _fold_gradients(self, in_products: bool) -> None:
        """Have every gradient added to its master's: where it can, by the product that makes it."""
        if in_products:
            for name, module in self.model.named_modules():
                if isinstance(module, Linear):
                    weight = f"{name}.weight"
                    self.sums[weight] = torch.zeros_like(self.masters[weight], requires_grad=False)
                    self.masters[weight].grad = self.sums[weight]
                    module.sum_gradients_into(self.sums[weight])
        for name, parameter in self.model.named_parameters():
            if name not in self.sums:
                parameter.register_post_accumulate_grad_hook(_folding_into(self.masters[name]))  # type: ignore[no-untyped-call]

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.sums:
            torch._foreach_zero_(list(self.sums.values()))
        for name, total in self.sums.items():
            self.masters[name].grad = total

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the module that computes."""
        if self.low_precision:
            torch._foreach_copy_(list(self.model.parameters()), list(self.masters.values()))


class _folding_into:  # noqa: N801 - reads as a verb where it is used
    """A hook that adds a bf16 gradient to its master's fp32 gradient and frees it."""

    def __init__(self, master: Tensor) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self.master.grad is None:
            self.master.grad = gradient.float()
        else:
            self.master.grad.add_(gradient)
        parameter.grad = None
