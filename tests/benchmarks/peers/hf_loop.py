"""Hugging Face's Llama in a bare loop: autocast for bf16, fused AdamW."""

import torch

from tests.benchmarks.peers.hf_model import llama
from tests.benchmarks.peers.work import BETAS, CLIP, DECAY, PEAK, asked, pairs


def main() -> None:
    want = asked()
    model = llama()
    compute = torch.compile(model) if want.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=BETAS, weight_decay=DECAY, fused=True)
    for tokens, targets in pairs():
        with torch.autocast("cpu", torch.bfloat16, enabled=want.precision == "bf16"):
            loss = compute(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


main()
