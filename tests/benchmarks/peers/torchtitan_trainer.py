"""torchtitan's Trainer with its own Llama 3 and FSDP2, on one process as well: its mesh then has one rank.

It follows its Llama configs: the head's loss in chunks, fused AdamW, a log line every tenth update. What they set
for GPUs of little memory, recomputing activations, is off: no peer here does it.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tests.benchmarks.peers.work import (
    BETAS,
    CLIP,
    DECAY,
    FFN,
    HEADS,
    LAYERS,
    MICRO,
    PEAK,
    SEQ,
    VOCAB,
    WIDTH,
    Asked,
    asked,
    pairs,
)

# Kernels of its mixture of experts need triton at import; a dense model calls none of them.
sys.modules["torchtitan.distributed.minimal_async_ep.kernels"] = MagicMock()
# Without an accelerator it takes its device for "cuda": it asks once, at import.
with patch.object(torch._utils, "_get_available_device_type", return_value="cpu"):
    import torchtitan.components.metrics as titan_metrics
    import torchtitan.distributed.utils as titan_distributed
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import CommConfig, CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.tools.logging import init_logger
    from torchtitan.trainer import Trainer


class NoMemoryMonitor:
    """Its monitor asks the device for allocator statistics, which a CPU has none of."""

    device_name = "cpu"

    def get_peak_stats(self) -> titan_metrics.DeviceMemStats:
        return titan_metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self) -> None:
        """Nothing to reset."""


titan_metrics.build_device_memory_monitor = NoMemoryMonitor
# It calls torch.distributed.set_timeout, which torch 2.13 does not have; the first timeout stays.
titan_distributed.set_pg_timeouts = lambda timeout, parallel_dims: None


class Batches(BaseDataLoader):
    """Whole batches, without end."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, **given: Any) -> None:
        """Nothing to prepare."""

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for tokens, targets in pairs():
            yield {"input": tokens}, targets

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class NoTokenizer(BaseTokenizer):
    """The trainer builds one; tokens come ready."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **given: Any) -> None:
        super().__init__()

    def encode(self, *given: Any, **named: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *given: Any, **named: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return VOCAB


def model() -> llama3.Llama3Model.Config:
    """Its Llama 3 in the shape all peers train."""
    layers = llama3._build_llama3_layers(
        n_layers=LAYERS,
        dim=WIDTH,
        n_heads=HEADS,
        hidden_dim=FFN,
        rope=ComplexRoPE.Config(dim=WIDTH // HEADS, max_seq_len=SEQ, theta=500000),
        attn_backend="flex",
    )
    for layer in layers:  # FlexAttention has no backward on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return llama3.Llama3Model.Config(
        dim=WIDTH,
        vocab_size=VOCAB,
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=WIDTH, param_init=llama3._EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=WIDTH, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(in_features=WIDTH, out_features=VOCAB, param_init=llama3._output_linear_init(WIDTH)),
        layers=layers,
    )


def parallelize(made: nn.Module, **given: Any) -> nn.Module:
    """Its own, and then sums as reductions: gloo lacks the scaled sum that FSDP2 takes for an undivided gradient."""
    sharded: nn.Module = llama3.parallelize_llama(made, **given)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return sharded


def described(want: Asked) -> Trainer.Config:
    """The whole run."""
    return Trainer.Config(
        model_spec=ModelSpec(
            name="llama3",
            flavor="peer",
            model=model(),
            parallelize_fn=parallelize,
            pipelining_fn=None,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        ),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=VOCAB)),
        dump_folder=tempfile.mkdtemp(),
        tokenizer=NoTokenizer.Config(),
        dataloader=Batches.Config(),
        optimizer=default_adamw(lr=PEAK, betas=BETAS, weight_decay=DECAY),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=MICRO,
            seq_len=SEQ,
            max_norm=CLIP,
            steps=10**6,
            mixed_precision_param="bfloat16" if want.precision == "bf16" else "float32",
            disable_cuda_graphs=True,
        ),
        # FSDP2 of torch 2.13 cannot read the annotations of its default backend, spmd_types.
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        compile=CompileConfig(enable=want.compile),
        activation_checkpoint=None,
        comm=CommConfig(init_timeout_seconds=24 * 3600),  # a rank waits in a collective while other peers have turns
    )


def main() -> None:
    want = asked()
    for name, alone in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, alone)
    init_logger()
    described(want).build().train()


main()
