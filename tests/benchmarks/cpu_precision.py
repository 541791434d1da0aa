"""How fast does fp32 train on this CPU, by llmtrain's rule for the precision of products? Prints one JSON object.

    python -m tests.benchmarks.cpu_precision --out tests/benchmarks/results/cpu_precision.json

The rule is products in `medium`, attention outside it. `llmtrain` is the engine as training uses it. `bare` is the same
decoder in a loop a user would write first, with torch's attention and its default precision, fused AdamW and one clip.
`hugging_face` is their Llama in such a loop (`gpu_hf`), with torch's default too. The model is 256 wide with 4 layers,
an update has 2048 random tokens, and sequences are of each of LENGTHS.

All three live in this process, whose allocator llmtrain has set, and take turns of some updates, in an order that moves
on by one with every turn. Tokens per second are of the median turn, ratios are llmtrain over another within a turn:
[lower quartile, median, upper quartile]. Where `medium` reaches nothing, on CPUs with AVX2 alone, the rule changes
nothing, and the ratios are of the rest.

Shapes: B sequences, T positions.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import llmtrain
from llmtrain.config import Config
from llmtrain.data.batches import Batch
from llmtrain.distributed import World, open_world
from llmtrain.engines import build_engine
from llmtrain.engines.numerics import set_numerics
from llmtrain.model.decoder import Block, Decoder
from llmtrain.model.precision import CPU_MULTIPLIES_BF16
from llmtrain.train.bench import RandomValues
from tests.benchmarks.gpu_hf import batches, seconds_of_updates
from tests.benchmarks.saving import cpu_name
from tests.ledger import run_config

LENGTHS = (64, 128, 256, 1024)
TOKENS = 2048
SHAPE = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "ffn_size": 688, "vocab_size": 4096}
FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx_ne_convert", "amx_bf16")
WARM_UP = 2
OURS = "llmtrain"


def config_of(seq_len: int) -> Config:
    """A run whose update is one micro-batch of TOKENS."""
    micro = TOKENS // seq_len
    return run_config(
        "tiny",
        {"kind": "single", "precision": "fp32"},
        1,
        micro,
        seq_len,
        model={**SHAPE, "max_seq_len": seq_len},
        batch={"global_sequences": micro, "micro": micro, "seq_len": seq_len},
    )


def by_llmtrain(config: Config, world: World) -> Iterator[float]:
    """Make updates without end, by the engine. Yields the seconds of each, until its loss is read."""
    engine = build_engine(config, world)
    engine.load(RandomValues(config, world.device), 0)
    for micro_batches in batches(config, world.device):
        begin = time.perf_counter()
        engine.train_step([Batch(*pair, all_valid=True) for pair in micro_batches], 1.0).loss.item()
        yield time.perf_counter() - begin


def by_bare_loop(config: Config, world: World) -> Iterator[float]:
    """The same with the decoder alone."""
    with torch.device("meta"):
        model = Decoder(config.model)
    model.to_empty(device=world.device)
    values = RandomValues(config, world.device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(values.read(name, "weight", 0, weight.numel()).view(weight.shape))
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.whole = torchs_attention
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.schedule.peak, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    for [(tokens, targets)] in batches(config, world.device):
        begin = time.perf_counter()
        loss = model(tokens, targets) / targets.numel()
        loss.backward()
        if optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        yield time.perf_counter() - begin


def torchs_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in the precision of the process. (B, H, T, Q) three times."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def set_precision(name: str, config: Config, world: World) -> None:
    """What a process has that trains this way."""
    set_numerics(config, world.device)
    if name != OURS:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


def measure(seq_len: int, turns: int, updates: int, world: World) -> dict[str, Any]:
    """Tokens a second of each way, and the ratios."""
    config = config_of(seq_len)
    ways = {
        OURS: by_llmtrain(config, world),
        "bare": by_bare_loop(config, world),
        "hugging_face": seconds_of_updates(config, world.device),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, turns):  # the first warms up
        names = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in names:
            set_precision(name, config, world)
            taken = [next(ways[name]) for _ in range(updates if turn >= 0 else WARM_UP)]
            if turn >= 0:
                rates[name].append(len(taken) * TOKENS / sum(taken))
    return {
        "tokens_per_s": {name: round(median(found)) for name, found in rates.items()},
        "llmtrain_over": {
            name: quartiles([ours / other for ours, other in zip(rates[OURS], found, strict=True)])
            for name, found in rates.items()
            if name != OURS
        },
    }


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return [round(low, 3), round(middle, 3), round(high, 3)]


def machine() -> dict[str, Any]:
    """The CPU, what of it matters here, and how busy it was."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "medium_reaches_it": CPU_MULTIPLIES_BF16,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open_world(600, collectives=False) as world:
        about = machine()
        lengths = {str(length): measure(length, asked.turns, asked.updates, world) for length in LENGTHS}
    result = {
        "machine": about,
        "versions": {
            "llmtrain": llmtrain.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "command": f"python -m tests.benchmarks.cpu_precision --turns {asked.turns} --updates {asked.updates}",
        "seq_len": lengths,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
