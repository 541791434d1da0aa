"""How well does the model predict held-out text?

Perplexity is exp(sum of NLL / number of tokens) over every token of a fixed, ordered set: fp64 sums over all ranks,
nothing dropped, nothing averaged twice. Nats per byte stand beside it, because they compare across tokenizers.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.data.batches import ValidationSet
from llmtrain.engines.base import Engine
from llmtrain.train.metrics import perplexity


def evaluate(engine: Engine, held_out: ValidationSet, micro: int, keep: Path | None = None) -> dict[str, Any]:
    """Loss (nats per token), perplexity and nats per byte of one set; equal on every rank.

    The first rank writes the summed nats and the tokens of each document to `keep`. (D, 2) float64
    """
    world, tokens = engine.world, held_out.num_tokens
    documents = torch.zeros(len(held_out.document_tokens), dtype=torch.float64)
    scored = torch.zeros(1, dtype=torch.float64)
    with engine.evaluating():
        for index, batch in enumerate(held_out.batches(world.rank, world.size, micro)):
            of_targets = held_out.documents((index * world.size + world.rank) * micro, micro)
            documents.index_add_(0, torch.from_numpy(of_targets), engine.nats(batch).flatten())
            scored += batch.num_valid
    documents = world.sum(documents)
    assert world.sum(scored) == tokens, f"{scored} tokens scored of {tokens}"
    nats = documents.sum().item()
    if keep is not None and world.first:
        with suppress(OSError):  # a full disk must not stop training: comparisons then lack the noise of the text
            np.save(keep, np.stack([documents.numpy(), held_out.document_tokens], axis=1))
    return {
        "set": held_out.name,
        "set_hash": held_out.hash,
        "num_tokens": held_out.num_tokens,
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "nats_per_byte": nats / held_out.num_bytes,
    }
