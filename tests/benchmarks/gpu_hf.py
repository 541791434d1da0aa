"""How fast does Hugging Face's Llama train in a bare loop, on the work of a config? Prints one JSON object.

    python -m tests.benchmarks.gpu_hf --config configs/1b_cosine.yaml --set batch.micro=8 --steps 10

It is what a user writes first: LlamaForCausalLM with SDPA and fp32 weights, autocast for bf16, fused AdamW, one clip,
the loss read after every update. Of the config's engine it takes the precision, `compile` (the whole model, its loss
within) and `activation_checkpointing` (all layers or none). Batches are random tokens. Updates are counted, and their
FLOPs, as `llmtrain bench` counts them. It saves nothing.

Shapes: B sequences, T positions.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmtrain.checkpoint.hf_model import to_hf_config
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.model.size import flops_per_token
from llmtrain.train.bench import WARM_UP
from llmtrain.train.throughput import memory_gib, peak_flops


def build(config: Config, device: torch.device) -> LlamaForCausalLM:
    """The config's model in fp32 on `device`, with values of transformers' own."""
    with device:
        model = LlamaForCausalLM(
            LlamaConfig(
                **to_hf_config(config.model, "float32", None),
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
    model.train()
    if config.engine.activation_checkpointing == "all":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batches(config: Config, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The micro-batches of each update: random tokens and their targets, each (B, T)."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.batch.accumulation(1), config.batch.micro, config.batch.seq_len + 1)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        yield [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def seconds_of_updates(config: Config, device: torch.device) -> Iterator[float]:
    """Make updates without end. Yields the seconds of each, until its loss is read."""
    model = build(config, device)
    compute = torch.compile(model, dynamic=False) if config.engine.compile else model
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.schedule.peak, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    low = config.engine.precision == "bf16"
    updates = batches(config, device)
    while True:
        begin = time.perf_counter()
        micro_batches = next(updates)
        total = torch.zeros((), device=device)
        for tokens, targets in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = compute(input_ids=tokens, labels=targets, shift_labels=targets).loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
        if optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        total.item()
        yield time.perf_counter() - begin


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Rates and memory of `steps` updates, after those that warm up; keys as in `llmtrain bench`."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    torch.set_float32_matmul_precision("high" if cuda else "medium")
    updates = seconds_of_updates(config, device)
    for _ in range(WARM_UP):
        next(updates)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [next(updates) for _ in range(steps)]
    typical = median(seconds)
    quarter = quantiles(seconds, n=4) if len(seconds) > 1 else [typical] * 3
    rate = config.batch.tokens / typical
    peak = peak_flops(device, config.engine.precision)
    per_token = flops_per_token(config.model, config.batch.seq_len)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "updates": steps,
        "step_s": round(typical, 6),
        "step_s_quartiles": [round(quarter[0], 6), round(quarter[2], 6)],
        "tokens_per_s": round(rate, 1),
        "flops_per_token": per_token,
        "mfu": None if peak is None else round(rate * per_token / peak, 4),
        "memory_gib": round(memory_gib(device), 3),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="always so: for the words of llmtrain bench")
    given = parser.parse_args(arguments)
    print(json.dumps(measure(load_config(given.config, given.overrides), given.steps)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
