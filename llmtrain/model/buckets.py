"""How large are the buffers through which ZeRO reduces gradients and fetches weights, and what does FSDP2 keep of them?

DeepSpeed allocates its reduce bucket whole, 500 million elements whatever the model. Here it holds at most the model's
gradients, which are then reduced in the same portions as with the default: the losses are the same. Under stage 3 the
next block is fetched ahead, whole, because blocks are gathered whole; and what stays gathered on every rank is what is
small beside the hidden size, ten times it at most, as under Hugging Face's "auto", so that the matrices of a small
model are sharded too. Nothing is above DeepSpeed's default. These sizes are in elements.

FSDP2 frees a gathered block after its forward and again after its backward pass, and gathers it anew for each. Weights
that take little memory are kept until the last backward pass of an update instead: one gather for all micro-batches.
"""

import math

from llmtrain.config import Config, ModelConfig
from llmtrain.model.initial import parameter_shapes
from llmtrain.model.size import parameter_count

REDUCED = 500_000_000  # DeepSpeed's defaults
PREFETCHED = 50_000_000
PERSISTENT = 100_000
PERSISTENT_ROWS = 10
KEPT_BYTES = 2**30  # of all weights, in the type that computes


def zero_buckets(model: ModelConfig, stage: int) -> dict[str, int]:
    """What `zero_optimization` of the JSON says of buffers, for a model under a ZeRO stage; nothing under stage 0."""
    if stage == 0:
        return {}
    elements = {name: math.prod(shape) for name, shape in parameter_shapes(model).items()}
    sizes = {"reduce_bucket_size": min(REDUCED, sum(elements.values()))}
    if stage == 3:
        block = sum(count for name, count in elements.items() if name.startswith("blocks.0."))
        sizes["stage3_prefetch_bucket_size"] = min(PREFETCHED, block)
        sizes["stage3_param_persistence_threshold"] = min(PERSISTENT, PERSISTENT_ROWS * model.hidden_size)
    return sizes


def keeps_gathered(config: Config) -> bool:
    """Whether FSDP2 keeps weights gathered from the first forward to the last backward pass of an update."""
    if config.engine.reshard_after_forward is not None:
        return not config.engine.reshard_after_forward
    return parameter_count(config.model) * (2 if config.engine.precision == "bf16" else 4) <= KEPT_BYTES
