"""How well does the model predict held-out text?

Perplexity is exp(sum of NLL / number of tokens) over every token of a fixed, ordered set: fp64 sums over all ranks,
nothing dropped, nothing averaged twice. Nats per byte stand beside it, because they compare across tokenizers.
"""

from typing import Any

import torch

from llmtrain.data.batches import ValidationSet
from llmtrain.engines.base import Engine
from llmtrain.train.metrics import perplexity


def evaluate(engine: Engine, held_out: ValidationSet, micro: int) -> dict[str, Any]:
    """Loss (nats per token), perplexity and nats per byte of one set; equal on every rank."""
    world = engine.world
    sums = torch.zeros(2, dtype=torch.float64)
    with engine.evaluating():
        for batch in held_out.batches(world.rank, world.size, micro):
            nats, tokens = engine.nats(batch)
            sums += torch.stack([nats, tokens])
    nats, tokens = world.sum(sums).tolist()
    assert tokens == held_out.num_tokens, f"{tokens} tokens scored of {held_out.num_tokens}"
    return {
        "set": held_out.name,
        "set_hash": held_out.hash,
        "num_tokens": held_out.num_tokens,
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "nats_per_byte": nats / held_out.num_bytes,
    }
