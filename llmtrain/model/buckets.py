"""How large are the buffers through which ZeRO reduces gradients and fetches weights, and what does FSDP2 keep of them?

DeepSpeed allocates its reduce bucket whole, 500 million elements whatever the model. Here it holds at most the model's
gradients, which are then reduced in the same portions as with the default: the losses are the same.

On several GPUs, stages 1 and 2 reduce one bucket while the backward pass fills another (`overlap_comm`). Only the last
bucket is waited for, so they are made smaller, an eighth of the model, and there are two of them. A parameter that does
not fit a bucket is reduced where autograd left its gradient, whose memory DeepSpeed 0.19 may free while the other
stream still reads it (`stage_1_and_2.py`, `reduce_ipg_grads`): then, and where the optimizer is on the host, nothing
overlaps. Stage 1 in bf16 is another optimizer of DeepSpeed's, which knows no buckets. On a CPU there are no streams.

Under stage 3 a block is gathered whole, and the next one is fetched ahead, tensor by tensor until
`stage3_prefetch_bucket_size` elements are asked for: as many as a block has, or what is missing is waited for when its
turn comes. What is gathered at a time (`stage3_max_live_parameters`) must hold two of them, or one and the head. What
stays gathered on every rank is what is small beside the hidden size, ten times it at most, as under Hugging Face's
"auto", so that the matrices of a small model are sharded too; it need not be fetched. Sizes are in elements.

FSDP2 frees a gathered block after its forward and again after its backward pass, and gathers it anew for each. Weights
that take little memory are kept until the last backward pass of an update instead: one gather for all micro-batches.
"""

import math
from typing import Any

from llmtrain.config import Config
from llmtrain.model.initial import parameter_shapes
from llmtrain.model.size import parameter_count

REDUCED = 500_000_000  # DeepSpeed's defaults
LIVE = 1_000_000_000
PERSISTENT = 100_000
PERSISTENT_ROWS = 10
OVERLAPPING = 8  # buckets of a model whose reduction overlaps
KEPT_BYTES = 2**30  # of all weights, in the type that computes


def zero_options(config: Config, ranks: int, device_type: str) -> dict[str, Any]:
    """What `zero_optimization` of the JSON says of buffers, by rule, with what `engine.deepspeed` says of it laid over.

    Nothing by rule under stage 0. `device_type` is "cuda" or "cpu".
    """
    stage = config.engine.zero_stage
    asked = config.engine.deepspeed.get("zero_optimization", {})
    asked = dict(asked) if isinstance(asked, dict) else {}
    if stage == 0:
        return asked
    shapes = parameter_shapes(config.model)
    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    options: dict[str, Any] = {"reduce_bucket_size": min(REDUCED, sum(elements.values()))}
    if stage == 3:
        persistent = min(PERSISTENT, PERSISTENT_ROWS * config.model.hidden_size)
        block = [count for name, count in elements.items() if name.startswith("blocks.0.")]
        options["stage3_prefetch_bucket_size"] = sum(count for count in block if count > persistent)
        options["stage3_max_live_parameters"] = max(LIVE, sum(block) + max(sum(block), elements["embed.weight"]))
        options["stage3_param_persistence_threshold"] = persistent
    elif ranks > 1 and device_type == "cuda" and _reduces_in_buckets(config) and not config.engine.offload.optimizer:
        largest = max(elements.values())
        bucket = max(largest, min(REDUCED, math.ceil(sum(elements.values()) / OVERLAPPING)))
        if int(asked.get("reduce_bucket_size", bucket)) >= largest:
            options |= {"reduce_bucket_size": bucket, "overlap_comm": True}
    return {**options, **asked}


def _reduces_in_buckets(config: Config) -> bool:
    """Whether stage 1 or 2 is DeepSpeed's ZeRO optimizer: stage 1 in bf16 is its BF16_Optimizer, unless offloaded."""
    engine = config.engine
    return engine.zero_stage == 2 or engine.precision == "fp32" or engine.offload.optimizer


def keeps_gathered(config: Config) -> bool:
    """Whether FSDP2 keeps weights gathered from the first forward to the last backward pass of an update."""
    if config.engine.reshard_after_forward is not None:
        return not config.engine.reshard_after_forward
    return parameter_count(config.model) * (2 if config.engine.precision == "bf16" else 4) <= KEPT_BYTES
