"""Hugging Face's Trainer, as its users start it."""

import tempfile
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from tests.benchmarks.peers.hf_model import llama
from tests.benchmarks.peers.work import BETAS, CLIP, DECAY, MICRO, PEAK, asked, paced


class Sequences(IterableDataset[dict[str, Tensor]]):
    """One sequence at a time: the Trainer's loader makes the micro-batches."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for tokens in paced():
            for row in tokens:
                yield {"input_ids": row[:-1], "labels": row[:-1]}


def main() -> None:
    want = asked()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=MICRO,
        max_steps=10**6,
        learning_rate=PEAK,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        bf16=want.precision == "bf16",
        use_cpu=True,
        torch_compile=want.compile,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=llama(), args=arguments, train_dataset=Sequences()).train()


main()
