"""`litgpt pretrain`: its `setup`, which always compiles; uncompiled where compilation is not asked for."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

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
    asked,
    paced,
)


class Batches(IterableDataset[Tensor]):
    """Whole batches, without end."""

    def __iter__(self) -> Iterator[Tensor]:
        return paced()


class Tokens(DataModule):
    """The data module that `setup` asks for its loaders."""

    def connect(self, tokenizer: object = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Nothing to prepare."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Batches(), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Batches(), batch_size=None)


def main() -> None:
    want = asked()
    if not want.compile:
        torch.compile = lambda model: model
    pretrain.setup(
        "peer",
        model_config=Config(
            name="peer",
            block_size=SEQ,
            vocab_size=VOCAB,
            padded_vocab_size=VOCAB,
            n_layer=LAYERS,
            n_head=HEADS,
            n_embd=WIDTH,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=FFN,
        ),
        out_dir=Path(tempfile.mkdtemp()),
        precision="bf16-mixed" if want.precision == "bf16" else "32-true",
        data=Tokens(),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=MICRO,
            micro_batch_size=MICRO,
            max_tokens=10**12,
            max_norm=CLIP,
            lr_warmup_steps=0,
            tie_embeddings=False,
            min_lr=PEAK,
        ),
        eval=EvalArgs(interval=10**9, max_iters=0, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": PEAK, "betas": list(BETAS), "weight_decay": DECAY},
        },
        devices=1,
        logger_name="csv",
    )


main()
