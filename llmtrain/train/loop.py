"""The loop: batches, update, log; once in a while validate, save, stop.

`k` is the number of the update being made, from 1, and of updates made after it. Everything that depends on where
training is depends on k alone: the learning rate, the samples of the batch, whether to validate or save.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtrain.checkpoint.saver import Saver
from llmtrain.config import Config
from llmtrain.data.batches import TrainBatches, ValidationSet
from llmtrain.engines.base import Engine, StepStats
from llmtrain.errors import CheckpointError, DivergenceError
from llmtrain.schedules import Schedule
from llmtrain.train import rng
from llmtrain.train.average import judge
from llmtrain.train.late import Late
from llmtrain.train.lock import RunLock
from llmtrain.train.metrics import MetricsLog
from llmtrain.train.progress import TrainingProgress
from llmtrain.train.stop import StopRequest
from llmtrain.train.throughput import memory_gib
from llmtrain.units import Length


@dataclass
class Trainer:
    """Everything one leg of a run needs, put together by `llmtrain.train.run`."""

    config: Config
    engine: Engine
    schedule: Schedule
    decay: Callable[[int], float]  # k to the multiplier of the weight decay
    batches: TrainBatches
    held_out: list[ValidationSet]
    saver: Saver
    lock: RunLock
    stop: StopRequest
    progress: TrainingProgress
    log: MetricsLog | None  # on the first rank
    mirror: Callable[[dict[str, Any]], None]
    facts: dict[str, Any]  # what every checkpoint and validation row says of the run
    attempt: int
    flops_per_token: float
    peak_flops: float | None  # of all devices together

    def train(self, first: int, last: int, *, validate_first: bool) -> str:
        """Make updates first..last. Returns why it stopped before `last`, or '' when it did not."""
        if validate_first:
            self.validate(first - 1)
        late = Late(self.engine.world.device, self.record)
        for k, micro_batches in enumerate(self.batches.iterate(first, last), start=first):
            stats = self.engine.train_step(micro_batches, self.schedule(k), self.decay(k))
            late.made(k, stats)
            validates = k == last or self.due(self.config.validation.every, k)
            if validates:
                late.flush()
                self.validate(k)
            permanent = k == last or self.due(self.config.checkpoint.every, k)
            saves = permanent or self.due(self.config.checkpoint.ephemeral, k)
            reason = self.stop.agreed(self.engine.world, due=validates or saves)
            must = k == last or bool(reason)
            if must or saves:
                late.flush()
                self.save(k, must=must, ephemeral=not permanent)
            if must:
                return "" if k == last else reason
            late.start()
        return ""

    def due(self, every: Length | None, k: int) -> bool:
        """Whether something done `every` so often is done after update k."""
        return every is not None and k % every.updates(self.config.batch.tokens, self.schedule.total_updates) == 0

    def tokens(self, k: int) -> int:
        """Tokens consumed through update k."""
        return self.batches.consumed(k) * self.config.batch.seq_len

    def record(self, k: int, stats: StepStats, seconds: float) -> None:
        """Log update k. Raises DivergenceError on every rank where its loss or gradient is not finite."""
        loss, grad_norm = stats.loss.item(), stats.grad_norm.item()
        tokens = self.config.batch.tokens
        flops = tokens * self.flops_per_token / seconds
        row = {
            "kind": "step",
            "step": k,
            "tokens": self.tokens(k),
            "loss": loss,
            "lr": stats.lr,
            "weight_decay": stats.weight_decay,
            "grad_norm": grad_norm,
            "step_time_s": round(seconds, 6),
            "tokens_per_s": round(tokens / seconds, 1),
            "mfu": None if self.peak_flops is None else round(flops / self.peak_flops, 4),
            "memory_gib": round(memory_gib(self.engine.world.device), 3),
            "attempt": self.attempt,
        }
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergenceError(
                f"update {k}: loss {loss}, gradient norm {grad_norm}. Nothing of it was saved. Start again from the "
                f"last checkpoint with a lower schedule.peak, a longer schedule.warmup or a lower optim.clip in a new "
                "run.dir; if it comes back at the same update, look at that batch's data"
            )
        self.write(row)
        self.progress.step(row)

    def validate(self, k: int) -> None:
        """Score every held-out set after update k."""
        for scores in judge(self.engine, self.config, self.held_out):
            row = {
                "kind": "validation",
                "step": k,
                "tokens": self.tokens(k),
                "lr": self.schedule.lr(k),
                "decayed": self.schedule.decayed(k),
                **scores,
                **self.facts["compare"],
                "attempt": self.attempt,
            }
            self.write(row)
            self.progress.validation(row)

    def save(self, k: int, *, must: bool, ephemeral: bool) -> None:
        """Save update k, in the background. Where it `must` succeed, wait for it, and raise where it does not."""
        state = {
            "step": k,
            "tokens": self.tokens(k),
            "samples": self.batches.consumed(k),
            "attempt": self.attempt,
            "metrics_offset": self.log.offset() if self.log else 0,
            **self.facts,
        }
        own = {rng.METADATA_KEY: rng.capture(self.engine.world.device)}
        self.saver.save(self.engine.state(), state, own, self.unready, ephemeral=ephemeral)
        if must and (failed := self.saver.finish()) is not None:
            raise CheckpointError(f"the checkpoint of update {k} could not be written: {failed}")

    def unready(self) -> str:
        """What keeps a checkpoint from being published now: another job on this run, rows not yet on the disk."""
        return self.lock.problem or (self.log.sync() if self.log else "")

    def write(self, row: dict[str, Any]) -> None:
        """One row to metrics.jsonl and its mirror."""
        if self.log is not None:
            self.log.append(row)
            self.mirror(row)
