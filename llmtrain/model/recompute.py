"""What does the backward pass compute again, so that it need not be kept?

`all` keeps only a block's input and computes the whole block again: a third more work. `cheap` keeps what products and
attention made, and computes again what only passes over memory: norms, rotations, and the product of the gate. The
choice is by operation, as torch's selective checkpointing makes it, with and without compilation.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import llmtrain.model.cpu_attention
import llmtrain.model.cudnn_attention  # noqa: F401, both define an operation that is named here

Recompute = Literal["none", "cheap", "all"]

PRODUCTS = 7  # of a block: q, k, v, out, gate, up, down
_aten = torch.ops.aten
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default}
_ATTENTION = {
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch._higher_order_ops.flex_attention,
    torch.ops.llmtrain.cpu_attention.default,
    torch.ops.llmtrain.cudnn_attention.default,
}


def keeping_products() -> tuple[Any, Any]:
    """Contexts of a block's forward pass and of its recomputation, for `torch.utils.checkpoint`'s `context_fn`."""
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy())  # type: ignore[no-untyped-call]
    return contexts


def _policy() -> Callable[..., CheckpointPolicy]:
    """What to keep, for one pass over a block. The last product ends the block, and nothing needs it backward."""
    made = {False: 0, True: 0}  # products so far, in the forward pass and while recomputing

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in _MATRIX_PRODUCTS:
            made[context.is_recompute] += 1
            if made[context.is_recompute] < PRODUCTS:
                return CheckpointPolicy.MUST_SAVE
        if operation in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
