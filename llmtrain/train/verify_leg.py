"""What does one leg of a verification do, update by update, exactly?

It is `llmtrain train` with an engine that writes down what goes through it: of every update the samples, the rates, the
loss and the gradient norm, and around the updates asked for the whole state and that of the generators. After every
update it draws a number from each generator, so that one which is not restored shows even where nothing else draws.
Every rank is a process of its own, started by `llmtrain.train.verify`:

    python -m llmtrain.train.verify_leg CONFIG OUT RESUME UPDATE,UPDATE
"""

import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from llmtrain.checkpoint.flat import RANK_FILE, write_rank_file
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.engines.base import Engine, FlatState, StateSource, StepStats
from llmtrain.errors import LlmtrainError
from llmtrain.train import average, rng
from llmtrain.train.run import train

UPDATES_FILE = "updates_{:05d}.jsonl"
STATE_FOLDER = "state_{:08d}"


class Recorder:
    """An engine that writes down what another one does. `around` are the updates whose state is kept."""

    def __init__(self, engine: Engine, out: Path, around: set[int]) -> None:
        self.engine = engine
        self.world = engine.world
        self.out = out
        self.wanted = set(around)
        self.update = 0

    def train_step(
        self, micro_batches: Sequence[Batch], lr_multiplier: float, decay_multiplier: float = 1.0
    ) -> StepStats:
        self._keep_state()
        samples = [digest for batch in micro_batches for digest in _digests(batch)]
        stats = self.engine.train_step(micro_batches, lr_multiplier, decay_multiplier)
        self.update += 1
        row = {
            "update": self.update,
            "lr": stats.lr,
            "weight_decay": stats.weight_decay,
            "samples": samples,
            "loss": stats.loss.item(),
            "grad_norm": stats.grad_norm.item(),
        }
        with (self.out / UPDATES_FILE.format(self.world.rank)).open("a") as file:
            file.write(json.dumps(row) + "\n")
        _draw(self.world.device)
        self._keep_state()
        return stats

    def evaluating(self) -> AbstractContextManager[None]:
        return self.engine.evaluating()

    def nats(self, batch: Batch) -> Tensor:
        return self.engine.nats(batch)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.engine.logits(tokens)

    def state(self) -> FlatState:
        return self.engine.state()

    def load(self, source: StateSource, update: int) -> None:
        self.engine.load(source, update)
        self.update = update

    def describe(self) -> str:
        return self.engine.describe()

    def _keep_state(self) -> None:
        """Write the state as it is now: once after an update that is wanted, or before the next where that is first."""
        if self.update not in self.wanted:
            return
        self.wanted.remove(self.update)
        folder = self.out / STATE_FOLDER.format(self.update)
        folder.mkdir(exist_ok=True)
        own = {rng.METADATA_KEY: rng.capture(self.world.device)}
        write_rank_file(folder / RANK_FILE.format(self.world.rank), self.engine.state(), own)


def _digests(batch: Batch) -> Iterator[str]:
    """Of each sequence: its tokens, its targets, and its documents where they are told apart."""
    parts = [part for part in (batch.tokens, batch.targets, batch.document_ids) if part is not None]
    for row in zip(*parts, strict=True):
        yield xxhash.xxh3_64_hexdigest(b"".join(part.numpy().tobytes() for part in row))


def _draw(device: torch.device) -> None:
    random.random()
    np.random.random()
    torch.rand(1)
    if device.type == "cuda":
        torch.rand(1, device=device)


def main(words: Sequence[str]) -> None:
    """Run this rank of a leg. Ends the process with an exit code where the user made a mistake."""
    path, out, resume, around = words

    def recorded(config: Config, world: World) -> Engine:
        return Recorder(average.build(config, world), Path(out), {int(update) for update in around.split(",")})

    try:
        train(load_config(path), prepare_command=f"llmtrain prepare --config {path}", resume=resume, build=recorded)
    except LlmtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo sometimes aborts while the interpreter ends, after all is written
