"""Hugging Face's Llama under bare FSDP2: each layer and the rest, bf16 compute with fp32 reduction."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.benchmarks.peers.hf_model import llama
from tests.benchmarks.peers.work import BETAS, CLIP, DECAY, PEAK, asked, pairs


def main() -> None:
    want = asked()
    dist.init_process_group("gloo")
    model = llama()
    compute = torch.bfloat16 if want.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        if want.compile:
            layer.compile()
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=BETAS, weight_decay=DECAY, fused=True)
    for tokens, targets in pairs():
        loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


main()
