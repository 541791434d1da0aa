"""Hugging Face's Llama under bare DeepSpeed: ZeRO with its bf16 engine and its defaults."""

import deepspeed
import torch

from tests.benchmarks.peers.hf_model import llama
from tests.benchmarks.peers.work import BETAS, CLIP, DECAY, MICRO, PEAK, asked, pairs


def main() -> None:
    want = asked()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(dist_init_required=False)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=BETAS, weight_decay=DECAY, fused=True)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": want.precision == "bf16"},
            "zero_optimization": {"stage": want.stage},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    if want.compile:
        engine.compile()
    for tokens, targets in pairs():
        loss = engine(input_ids=tokens, labels=targets, shift_labels=targets).loss
        engine.backward(loss)
        engine.step()
        loss.item()


main()
