"""How fast does one config train on this GPU, and in which kernels? `llmtrain bench` in fewer updates; prints JSON.

python -m tests.benchmarks.gpu_bench --config configs/1b_cosine.yaml --set batch.micro=8 --steps 8 --kernels
"""

import argparse
import collections
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.config_file import load_config
from llmtrain.train.bench import bench

CLASSES = {
    "communication": ("nccl",),
    "attention": ("flash", "fmha", "attn", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "wgmma"),
    "copies": ("memcpy", "memset"),
    "optimizer": ("multi_tensor", "adam"),
    "fused pointwise": ("triton",),
}
LONGEST = 15


def kernels(trace: Path) -> dict[str, Any]:
    """Of a Chrome trace of two updates: how busy the GPU was, and its milliseconds by class and by kernel."""
    events = json.loads(trace.read_text())["traceEvents"]
    ran = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e]
    if not ran:
        return {}
    ran.sort(key=lambda e: float(e["ts"]))
    busy, until = 0.0, float(ran[0]["ts"])
    classes: collections.Counter[str] = collections.Counter()
    longest: collections.Counter[str] = collections.Counter()
    for event in ran:
        begin, end = float(event["ts"]), float(event["ts"]) + event["dur"]
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
        name = event["name"].lower()
        kind = next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)), "other")
        classes[kind] += event["dur"]
        longest[event["name"][:90]] += event["dur"]
    return {
        "busy": round(busy / (until - float(ran[0]["ts"])), 4),
        "ms_of_two_updates": {kind: round(us / 1e3, 2) for kind, us in classes.most_common()},
        "longest_ms": {name: round(us / 1e3, 2) for name, us in longest.most_common(LONGEST)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--kernels", action="store_true", help="also profile two updates")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json" if given.kernels else None
        config = load_config(given.config, given.overrides)
        result = bench(config, steps=given.steps, warm_up=2, phases=False, trace=trace)
        if result is not None:
            print(json.dumps({**result, **({"kernels": kernels(trace)} if trace else {})}), flush=True)


if __name__ == "__main__":
    main()
