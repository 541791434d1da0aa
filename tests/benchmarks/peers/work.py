"""What does every peer train, and how is it timed?

A LLaMA 256 wide with 4 layers, 8 heads, feed-forward 688 and vocabulary 4096, on random tokens: sequences of 256, 8 of
them in a micro-batch on each rank, which is the whole update; AdamW at 1e-3, betas 0.9 and 0.95, decay 0.1, clip 1.

A peer pulls its batches from `paced`, one at each update, so its own loop runs as it is. Before the first batch of a
segment the iterator waits for a number on stdin, the segment's updates, and after the last one it answers with a JSON
line of the seconds taken: peers stay alive and take turns. Seconds are of the wall clock and of this process's CPU
time, which other work on the machine disturbs less. Only the first rank speaks; the others follow in collectives.

Letters: B sequences, T positions, V vocabulary.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

WIDTH, LAYERS, HEADS, FFN, VOCAB, SEQ, MICRO = 256, 4, 8, 688, 4096, 256, 8
PEAK, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
WARM_UP = 3
RANK = int(os.environ.get("RANK", "0"))


class Asked(argparse.Namespace):
    """What one peer is asked to be."""

    precision: str
    compile: bool
    matmul: str
    stage: int


def asked() -> Asked:
    """The settings on the command line, matmul precision already set. From here on only answers go to stdout."""
    os.dup2(2, 1)  # frameworks print there what is no answer
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--matmul", choices=["highest", "high", "medium"], default="highest")
    parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
    found = parser.parse_args(namespace=Asked())
    torch.set_float32_matmul_precision(found.matmul)
    return found


def paced() -> Iterator[Tensor]:
    """Batches (B, T + 1) without end, timed in segments. The first segment warms up and is not told."""
    generator = torch.Generator().manual_seed(RANK)
    batches = [torch.randint(VOCAB, (MICRO, SEQ + 1), generator=generator) for _ in range(8)]
    updates, made = WARM_UP, 0
    begin, cpu = time.perf_counter(), time.process_time()
    while True:
        if RANK == 0 and made == updates:
            taken = {"updates": made, "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
            _say(taken)
            line = sys.stdin.readline()
            if not line.strip():
                leave()
            updates, made = int(line), 0
            begin, cpu = time.perf_counter(), time.process_time()
        made += 1
        yield batches[made % len(batches)]


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, each (B, T)."""
    for tokens in paced():
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def leave() -> NoReturn:
    """End this process at once: frameworks have threads and handlers of their own."""
    sys.stderr.flush()
    os._exit(0)


def _say(values: dict[str, Any]) -> None:
    os.write(_ANSWERS, (json.dumps(values) + "\n").encode())


_ANSWERS = os.dup(1)
