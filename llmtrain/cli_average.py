"""`llmtrain average` and `llmtrain lr-find`: what a cooldown would give, and where training breaks."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.train.merge import Averages
    from llmtrain.train.range_test import RangeTest

Json = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    last: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="The newest N checkpoints; by default all.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="A,B,...", help="The checkpoints of these updates.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="Of the decay to stand for: uniform, linear, 1-sqrt, cosine, mirror-cosine, square, half-life; "
            "repeatable. [all]",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the mean, for run.init_from.")] = None,
    as_json: Json = False,
) -> None:
    """Merge a run's checkpoints as a cooldown would, and score them beside the newest."""
    if last is not None and steps is not None:
        raise typer.BadParameter("--last and --steps both say which checkpoints: write one of them")
    from llmtrain.train.merge import SHAPES, average_run

    found = average_run(run, last=last, steps=_updates(steps), shapes=shape or SHAPES, out=out)
    if as_json:
        print(json.dumps(found._asdict()))
    else:
        _print_averages(found)
    if out is not None:
        print(f"wrote {out}: start a run from it with run.init_from", file=sys.stderr if as_json else sys.stdout)


def lr_find(
    config: Annotated[Path, typer.Option("--config", "-c", help="The YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, e.g. optim.clip=0.5.")
    ] = None,
    low: Annotated[float, typer.Option("--from", metavar="LR", help="The first rate.")] = 1e-7,
    high: Annotated[float, typer.Option("--to", metavar="LR", help="The last rate.")] = 10.0,
    updates: Annotated[int, typer.Option(metavar="N", help="From the first rate to the last.")] = 100,
    from_checkpoint: Annotated[
        str | None, typer.Option(metavar="RUN@STEP", help="Start from a checkpoint; by default as a new run does.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a figure.")] = None,
    as_json: Json = False,
) -> None:
    """Find the learning rate at which training breaks, and the peaks worth sweeping below it. Changes nothing."""
    from llmtrain.config_file import load_config
    from llmtrain.train.range_test import find_edge, peaks_to_sweep

    data = [f"--set {shlex.quote(text)}" for text in overrides or [] if text.startswith(("data.", "model."))]
    found = find_edge(
        load_config(config, overrides),
        low=low,
        high=high,
        updates=updates,
        from_checkpoint=from_checkpoint,
        prepare_command=" ".join([f"llmtrain prepare --config {config}", *data]),
    )
    if found is None:
        return
    peaks = [] if found.edge in (None, found.rates[0]) else peaks_to_sweep(found.edge)
    if png is not None:
        from llmtrain.errors import EnvironmentError
        from llmtrain.study.range_figure import write_png

        try:
            write_png(found.rates, found.losses, found.smoothed, found.edge, peaks, png)
        except OSError as error:
            raise EnvironmentError(f"cannot write {png}: {error.strerror}") from None
    if as_json:
        losses, smoothed = (
            [x if math.isfinite(x) else None for x in values] for values in (found.losses, found.smoothed)
        )
        print(json.dumps({**found._asdict(), "losses": losses, "smoothed": smoothed, "peaks": peaks}))
    else:
        _print_edge(found, peaks)
    if png is not None:
        print(f"wrote {png}", file=sys.stderr if as_json else sys.stdout)


def _updates(steps: str | None) -> list[int] | None:
    if steps is None:
        return None
    words = [word.strip() for word in steps.split(",")]
    if not all(word.isdigit() for word in words):
        raise typer.BadParameter(f"--steps {steps}: write updates, such as 1000,2000,3000")
    return [int(word) for word in words]


def _print_averages(found: "Averages") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    print(f"checkpoints of updates {', '.join(map(str, found.steps))}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("weights", no_wrap=True)
    table.add_column("set", no_wrap=True)
    for name in ("loss", "over newest", "perplexity", "nats/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    newest = {row["set"]: row["loss"] for row in found.rows if row["weights"] == "newest"}
    for row in found.rows:
        gain = "" if row["weights"] == "newest" else f"{row['loss'] - newest[row['set']]:+.4f}"
        numbers = (f"{row['loss']:.4f}", gain, f"{row['perplexity']:.2f}", f"{row['nats_per_byte']:.4f}")
        table.add_row(row["weights"], row["set"], *numbers)
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)
    for text in found.warnings:
        print(f"warning: {text}")


def _print_edge(found: "RangeTest", peaks: list[float]) -> None:
    first, last = found.rates[0], found.rates[-1]
    print(f"{len(found.rates)} updates from {first:.3g} to {last:.3g}; {found.ended}")
    if found.edge is None:
        print(f"no edge: the loss did not rise up to {last:.3g}; test further, with --to {10 * last:.3g}")
    elif found.edge == first:
        print(f"no edge: the loss rose at once; start lower, with --from {first / 100:.3g}")
    else:
        print(f"stability edge: {found.edge:.3g}, the last rate before the loss rose")
        print(
            "this is no peak to train at: the best one of a whole run lies 3 to 30 times lower. In a study file, sweep"
        )
        print(f"peaks: [{', '.join(f'{peak:g}' for peak in peaks)}]")
