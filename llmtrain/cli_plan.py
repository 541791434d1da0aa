"""`llmtrain plan`: what a run costs and whether it fits, before it starts. No torch, no GPU, so it answers at once."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from llmtrain.planner.plan import Plan

GIB = 2**30


def plan(
    config: Annotated[Path, typer.Option("--config", "-c", help="The YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, for example batch.micro=2.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks, one a GPU.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Such as h100, a100-40gb, b200; any other with --gpu-memory. [h100 without both]"
        ),
    ] = None,
    gpu_memory: Annotated[float | None, typer.Option(metavar="GIB", help="Of one GPU, instead of its own.")] = None,
    gpu_peak: Annotated[
        float | None, typer.Option(metavar="TFLOPS", help="Dense bf16 TFLOP/s of one GPU, instead of its own.")
    ] = None,
    gpu_bandwidth: Annotated[
        float | None, typer.Option(metavar="TB/S", help="Memory bandwidth of one GPU, instead of its own.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="Model FLOPs utilisation, 0 to 1. [0.4, assumed]")] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN|FILE", help="Take the MFU of a run folder or of a benchmark's JSON.")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Of one GPU, as measured.")] = None,
    disk_bandwidth: Annotated[float, typer.Option(metavar="GB/S", help="Of saves, over all ranks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout; bytes and seconds.")] = False,
) -> None:
    """Parameters, bytes on a GPU by kind, FLOPs, time and disk of a run; what fits, and what would make it fit."""
    from llmtrain.config_file import load_config
    from llmtrain.planner.gpus import find_gpu
    from llmtrain.planner.measured import read_mfu
    from llmtrain.planner.plan import make_plan

    _check(mfu, measured, tokens_per_second)
    _check_positive(
        {
            "gpu-memory": gpu_memory,
            "gpu-peak": gpu_peak,
            "gpu-bandwidth": gpu_bandwidth,
            "tokens-per-second": tokens_per_second,
            "disk-bandwidth": disk_bandwidth,
        }
    )
    card = find_gpu(gpu, gpu_memory, gpu_peak, gpu_bandwidth)
    asked = load_config(config, overrides)
    precision = asked.engine.precision
    if card.flops(precision) is None and (mfu is not None or measured is not None):
        peak = (
            "--tokens-per-second" if precision == "fp32" else "--gpu-peak (dense bf16, TFLOP/s), or --tokens-per-second"
        )
        raise typer.BadParameter(
            f"an MFU is a part of a peak, and that of {card.name} is not known in {precision}: give {peak} instead of "
            "the MFU"
        )
    made = make_plan(
        asked,
        gpus,
        card,
        mfu=mfu if measured is None else read_mfu(measured),
        tokens_per_second=tokens_per_second,
        bandwidth=disk_bandwidth * 1e9,
    )
    if as_json:
        print(json.dumps(facts(made)))
    else:
        _print(made)


def facts(made: "Plan") -> dict[str, Any]:
    """The plan as JSON: bytes, seconds, and `memory.total`."""
    values = asdict(made)
    values["memory"]["total"] = made.memory.total
    values["gpu"]["usable"] = made.gpu.usable
    return values


def _check(mfu: float | None, measured: Path | None, tokens: float | None) -> None:
    if sum(source is not None for source in (mfu, measured, tokens)) > 1:
        raise typer.BadParameter("give one of --mfu, --measured and --tokens-per-second")
    if mfu is not None and not 0 < mfu <= 1:
        raise typer.BadParameter(f"--mfu {mfu} is not above 0 and at most 1: 0.4 is 40 %")


def _check_positive(given: dict[str, float | None]) -> None:
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise typer.BadParameter(f"--{name} {value} must be a number above 0")


def _print(made: "Plan") -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    console.print(_memory_table(made))
    console.print("\n".join(_verdict(made)), soft_wrap=True)
    console.print(_layout_table(made))
    console.print("\n".join(_costs(made)), soft_wrap=True)


def _memory_table(made: "Plan") -> "Table":
    found = made.memory
    table = _table(f"One of {made.ranks} x {made.gpu.name}, in the {found.at}", "kind", "GiB", "host GiB")
    for kind in dict.fromkeys([*found.kinds, *found.host]):
        here, host = found.kinds.get(kind, 0), found.host.get(kind, 0)
        if here or host:
            table.add_row(kind, _gib(here) if here else "", _gib(host) if host else "")
    table.add_section()
    table.add_row("together", _gib(found.total), _gib(sum(found.host.values())) if found.host else "")
    return table


def _verdict(made: "Plan") -> list[str]:
    from llmtrain.planner.plan import describe

    room = (
        f"{_gib(made.memory.total)} of the {_gib(made.gpu.usable)} GiB that tensors may take of {_gib(made.gpu.memory)}"
    )
    largest = "none" if made.largest_micro is None else str(made.largest_micro)
    lines = [f"{'FITS' if made.fits else 'DOES NOT FIT'}: {room}; largest micro-batch that fits: {largest}"]
    lines += [f"- {describe(change)}  ({_gib(change.total)} GiB)" for change in made.changes]
    if not made.fits and not made.changes:
        lines.append("- nothing here makes it fit: a smaller model, shorter sequences or a larger GPU")
    return [*lines, *(f"note: {warning}" for warning in made.warnings)]


def _layout_table(made: "Plan") -> "Table":
    title = f"What fits {made.gpu.name}"
    table = _table(title, "layout", f"GiB on {made.ranks}", f"largest micro on {made.ranks}", "fewest GPUs")
    for layout in made.layouts:
        cells = (None if layout.total is None else _gib(layout.total), layout.largest_micro, layout.fewest_ranks)
        table.add_row(layout.name, *("-" if cell is None else str(cell) for cell in cells))
    return table


def _costs(made: "Plan") -> list[str]:
    from llmtrain.planner.plan import FLOPS_FORMULA

    disk, pace = made.disk, made.pace
    tokens = made.updates * made.tokens_per_update
    every = "at the end" if disk.every is None else f"every {disk.every:,} updates"
    lines = [
        f"{made.parameters:,} parameters; {made.flops_per_token / 1e9:,.2f} GFLOP a token ({FLOPS_FORMULA})",
        f"{made.tokens_per_update:,} tokens an update, {made.accumulation} micro-batches a rank; {made.updates:,} "
        f"updates, {tokens:,} tokens, {tokens * made.flops_per_token:.3g} FLOP",
    ]
    if pace is None:
        # A peak in bf16 says nothing of fp32, which has no tensor cores.
        flags = "--gpu-peak (dense bf16, TFLOP/s) or " if made.gpu.bf16_flops is None else ""
        lines.append(f"no time: {made.unexpected}; give {flags}--tokens-per-second")
    else:
        reached = "" if pace.mfu is None else f", MFU {pace.mfu:.1%}"
        lines.append(
            f"{pace.days:,.2f} days at {pace.step_seconds:,.2f} s an update, {pace.tokens_per_second:,.0f} tokens/s"
            f"{reached} ({pace.source})"
        )
    lines.append(_fastest(made))
    lines.append(
        f"checkpoints of {disk.checkpoint / 1e9:,.1f} GB {every}, {disk.seconds:,.0f} s each; {disk.kept} kept, "
        f"{disk.peak / 1e9:,.1f} GB of disk with the one being written"
    )
    return lines


def _fastest(made: "Plan") -> str:
    """The recommended choice and what it should reach, or why there is none."""
    best = made.recommended
    if best is None:
        return f"no choice to recommend: {made.unexpected or 'nothing fits with this layout'}"
    flags = "".join(f" --set {override}" for override in best.overrides)
    found = best.speed
    reached = f"{found.step_seconds:,.2f} s an update, {found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}"
    beside = "" if made.expected is None or not flags else f"; as configured {made.expected.step_seconds:,.2f} s"
    on_top = "; communication that does not overlap comes on top" if made.ranks > 1 else ""
    return (
        f"fastest that fits, expected from measurements on an h200:{flags or ' as configured'}: {reached}, "
        f"{_gib(best.total)} GiB{beside}{on_top}"
    )


def _table(title: str, *columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f}"
