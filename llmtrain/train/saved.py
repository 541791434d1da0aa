"""What does a saved run know? Score it again, or let it write."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.store import Checkpoint, CheckpointStore
from llmtrain.config import Config, EngineConfig
from llmtrain.config_file import checkpoints_of, load_config
from llmtrain.data.dataset import open_data
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import Engine
from llmtrain.errors import CheckpointError
from llmtrain.train.feed import validation_sets
from llmtrain.train.validation import evaluate


@contextmanager
def opened(run_dir: Path, step: int | None) -> Iterator[tuple[Config, Engine, Checkpoint]]:
    """A run's config and checkpoint (the newest whole one, or that of `step`), in an engine on one device."""
    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.yaml")
    config = load_config(run_dir / "config.yaml")
    engine_config = EngineConfig(kind="single", precision=config.engine.precision)
    config = config.model_copy(update={"engine": engine_config})
    with open_world(config.engine.timeout_s, collectives=False) as world:
        checkpoint, rejected = CheckpointStore(checkpoints_of(run_dir), world, keep=2).pick(step)
        for text in rejected:
            print(f"rejected {text}", file=sys.stderr)
        engine = build_engine(config, world)
        engine.load(checkpoint.reader, checkpoint.step)
        yield config, engine, checkpoint


def evaluate_run(run_dir: Path, step: int | None = None) -> list[dict[str, Any]]:
    """One validation row for each of the run's held-out sets, as training logged it after that update."""
    with opened(run_dir, step) as (config, engine, checkpoint):
        data = open_data(config.data.path, f"llmtrain prepare --config {run_dir / 'config.yaml'}")
        micro = config.validation.micro or config.batch.micro
        rows = [evaluate(engine, held_out, micro) for held_out in validation_sets(config, data)]
        return [{"step": checkpoint.step, "tokens": checkpoint.state["tokens"], **row} for row in rows]


def generate(
    run_dir: Path, prompt: str, *, max_tokens: int, temperature: float, seed: int, step: int | None = None
) -> Iterator[str]:
    """Yield the growing text, the prompt included. Temperature 0 takes the likeliest token every time.

    The whole context is computed again for every token: simple, and meant for a look at a model, not for serving it.
    """
    with opened(run_dir, step) as (config, engine, _):
        data = open_data(config.data.path, f"llmtrain prepare --config {run_dir / 'config.yaml'}")
        tokenizer = Tokenizer.load(data.tokenizer_path)
        ids = [tokenizer.eos_id, *tokenizer.encode([prompt])[0]]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_tokens):
            with engine.evaluating():
                logits = engine.logits(torch.tensor([ids[-config.model.max_seq_len :]]))[0, -1].cpu()
            logits = logits[: tokenizer.vocab_size]
            if temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                ids.append(int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)))
            if ids[-1] == tokenizer.eos_id:
                return
            yield tokenizer.decode(ids[1:])
