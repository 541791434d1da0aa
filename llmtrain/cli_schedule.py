"""`llmtrain schedule`: look at learning-rate schedules before paying for a run. No torch, so it answers at once."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmtrain.schedules.registry import Shape
    from llmtrain.study.schedule_shown import Shown

schedule_app = typer.Typer(
    help="Look at learning-rate schedules before you spend.", no_args_is_help=True, rich_markup_mode=None
)

_COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan")


@schedule_app.command("list", epilog="Example: llmtrain schedule list --json")
def list_schedules(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Every registered schedule with its parameters and their defaults."""
    from llmtrain.schedules import catalog

    if as_json:
        print(json.dumps({"schedules": [_entry(shape) for shape in catalog()]}))
        return
    for shape in catalog():
        parameters = ", ".join(name if p.required else f"{name}={p.default}" for name, p in shape.parameters.items())
        print(f"{shape.name:<14} {shape.doc.splitlines()[0]}" + (f"  [{parameters}]" if parameters else ""))


@schedule_app.command(epilog="Example: llmtrain schedule show cosine linear wsd:decay=10% --png lr.png")
def show(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Such as cosine, or wsd:decay=10%.")] = None,
    configs: Annotated[
        list[Path] | None, typer.Option("--config", "-c", metavar="FILE", help="A run; names use its numbers.")
    ] = None,
    peak: Annotated[float | None, typer.Option(help="Largest learning rate. [3e-4]", metavar="LR")] = None,
    warmup: Annotated[str | None, typer.Option(help='"2000 steps", auto. [1%]', metavar="LENGTH")] = None,
    horizon: Annotated[str | None, typer.Option(help='"8B tokens". [10000 steps]', metavar="LENGTH")] = None,
    floor: Annotated[float | None, typer.Option(help="Final multiplier of the peak. [0]", metavar="M")] = None,
    convention: Annotated[str | None, typer.Option(help="Count updates as hf, olmo, ... do.", metavar="WHOSE")] = None,
    tokens_per_update: Annotated[str | None, typer.Option(help="Global batch. [4M]", metavar="N")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's lambda. [0.1]", metavar="X", min=0)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="For all that have this KEY.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone; lr[0]: update 1.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write a row an update.", metavar="FILE")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a figure.", metavar="FILE")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an interactive page.", metavar="FILE")] = None,
) -> None:
    """The learning rate of every update, and what it amounts to."""
    from llmtrain.study.schedule_shown import facts, look_at

    fields = {"peak": peak, "warmup": warmup, "horizon": horizon, "floor": floor, "convention": convention}
    words = [f"schedule.{key}={value}" for key, value in fields.items() if value is not None]
    shown = look_at(names or [], configs or [], [*words, *(overrides or [])], tokens_per_update, weight_decay)
    _write_files(shown, csv, png, html)
    if as_json:
        found = [facts(one) for one in shown]
        print(json.dumps(found[0] if len(found) == 1 else {"schedules": found}, allow_nan=False))
    else:
        _print_view(shown)
    for path in (csv, png, html):
        if path is not None:
            print(f"wrote {path}", file=sys.stderr if as_json else sys.stdout)


@schedule_app.command(epilog="Example: llmtrain schedule refine runs/demo_cosine --out refined.yaml")
def refine(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished pilot run.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the schedule section.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a figure.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """The schedule that the gradient norms of a pilot run ask for: its warm-up and decay come out by themselves."""
    from llmtrain.study.law.optimise import section_yaml, write_section
    from llmtrain.study.refine import refine as derive
    from llmtrain.study.schedule_shown import facts

    found = derive(run)
    if out is not None:
        write_section(found.section, out)
    _write_files(found.shown, None, png, None)
    if as_json:
        about = {"derived": found.derived, "warnings": found.warnings, "schedules": [facts(one) for one in found.shown]}
        print(json.dumps({"schedule": found.section, **about}, allow_nan=False))
    else:
        _print_view(found.shown)
        print("\n".join([*found.derived, *(f"warning: {text}" for text in found.warnings)]))
        if out is None:
            print(section_yaml(found.section), end="")
    for path in (out, png):
        if path is not None:
            print(f"wrote {path}", file=sys.stderr if as_json else sys.stdout)


def _write_files(shown: "Sequence[Shown]", csv: Path | None, png: Path | None, html: Path | None) -> None:
    from llmtrain.errors import EnvironmentError
    from llmtrain.study.schedule_shown import write_csv

    try:
        if csv is not None:
            write_csv(shown, csv)
        if png is not None:
            from llmtrain.study.schedule_figure import write_png

            write_png(shown, png)
        if html is not None:
            from llmtrain.study.schedule_page import write_html

            write_html(shown, html)
    except OSError as error:
        raise EnvironmentError(f"cannot write {error.filename}: {error.strerror}") from None


def _print_view(shown: "Sequence[Shown]") -> None:
    from llmtrain.study.schedule_view import NOTES, plain, table, terminal_plot, warnings

    paint = _paint if sys.stdout.isatty() and "NO_COLOR" not in os.environ else plain
    print(terminal_plot(shown, paint))
    print()
    print(table(shown, paint))
    print()
    print("\n".join([*NOTES, *warnings(shown)]))


def _paint(text: str, index: int) -> str:
    return text if index < 0 else typer.style(text, fg=_COLOURS[index % len(_COLOURS)])


def _entry(shape: "Shape") -> dict[str, Any]:
    parameters = {
        name: {"type": p.type_name, "required": p.required, "default": None if p.required else p.default}
        for name, p in shape.parameters.items()
    }
    return {"name": shape.name, "version": shape.version, "doc": shape.doc, "parameters": parameters}
