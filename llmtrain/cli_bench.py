"""`llmtrain bench`: how fast does this config train here?"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

TRACE = "{name}_trace.json"


def bench(
    config: Annotated[Path, typer.Option("--config", "-c", help="The YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, for example batch.micro=2.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates that are timed, after those that warm up.")] = 20,
    profile: Annotated[bool, typer.Option("--profile", help="Also write NAME_trace.json, a Chrome trace.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Tokens per second, FLOP utilisation, memory against the plan, and where the time goes. Start it as training."""
    from llmtrain.config_file import load_config

    loaded = load_config(config, overrides)
    from llmtrain.train.bench import bench as run

    trace = Path(TRACE.format(name=loaded.run.name)) if profile else None
    result = run(loaded, steps=steps, trace=trace)
    if result is None:
        return
    if as_json:
        print(json.dumps(result))
        return
    _print(result)
    if trace is not None:
        print(f"trace of two updates: {trace}")


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in _lines(result):
        table.add_row(name, text)
    Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What is shown, as names and texts."""
    low, high = result["step_s_quartiles"]
    phases = result["phases_s"]
    whole = sum(phases.values()) or 1.0
    mfu = "unknown" if result["mfu"] is None else f"{result['mfu']:.1%}"
    hfu = "" if result["hfu"] in (None, result["mfu"]) else f", with what is computed again {result['hfu']:.1%}"
    kind = result["engine"]["kind"]
    engine = f"ZeRO-{result['engine']['zero_stage']}" if kind == "deepspeed" else kind
    rows = [
        ("device", f"{result['ranks']} x {result['device']}, {engine}, {result['precision']}"),
        ("model", f"{result['parameters']:,} parameters, {result['tokens_per_update']:,} tokens an update"),
        ("data", result["data"]),
        ("launch to first update", f"{result['launch_to_first_update_s']:.1f} s, without loading Python and torch"),
        ("update", f"{result['step_s']:.4f} s (quartiles {low:.4f} to {high:.4f}), median of {result['updates']}"),
        ("tokens/s", f"{result['tokens_per_s']:,.0f}, {result['tokens_per_s_per_device']:,.0f} a device"),
        ("TFLOP/s a device", f"{result['tflops_per_device']:.3f} by {result['formula']}"),
        ("MFU", f"{mfu}{hfu} ({result['peak_source']})"),
        ("memory", f"{result['memory_gib']:.2f} GiB at most, tensors planned {result['planned_gib']:.2f} GiB"),
    ]
    rows += [(name, f"{seconds:9.5f} s  {seconds / whole:6.1%}") for name, seconds in phases.items()]
    within = result["communication_s"].items()
    rows += [(name, f"{seconds:9.5f} s  {seconds / whole:6.1%}  within the phases") for name, seconds in within]
    return rows + [(name.removesuffix("_gb_per_s"), f"{rate} GB/s") for name, rate in result["collectives"].items()]
