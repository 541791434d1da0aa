"""`llmtrain law`: what would another schedule have given? Learnt from a few runs, without torch, on a login node."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

law_app = typer.Typer(
    help="Predict the loss of schedules that were not run.", no_args_is_help=True, rich_markup_mode=None
)

LawFile = Annotated[Path, typer.Option("--law", metavar="FILE", help="What `llmtrain law fit --out` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
Warmup = Annotated[str | None, typer.Option(help='"2000 steps". [as fitted]', metavar="LENGTH")]
Horizon = Annotated[str | None, typer.Option(help='"50000 steps". [the longest fitted]', metavar="LENGTH")]
Floor = Annotated[float | None, typer.Option(help="Lowest multiplier. [the lowest fitted]", metavar="M", min=0, max=1)]


@law_app.command(epilog="Example: llmtrain law fit runs/wsd runs/cosine --test runs/linear --out runs/law.json")
def fit(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|CSV...", help="Run folders, or CSV files step,lr,loss.")],
    test: Annotated[
        list[Path] | None, typer.Option("--test", metavar="RUN|CSV", help="Not fitted but predicted; repeatable.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="Updates of warm-up. [up to the first at the peak]")
    ] = None,
    burn_in: Annotated[
        int, typer.Option(min=0, metavar="K", help="Updates after the warm-up to leave out too; for small models.")
    ] = 0,
    loss: Annotated[str, typer.Option(metavar="validation|train", help="Which loss of run folders.")] = "validation",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the law.")] = None,
    as_json: Json = False,
) -> None:
    """Fit the laws to runs that differ in their schedule alone."""
    if loss not in ("validation", "train"):
        raise typer.BadParameter(f"--loss {loss}: choose validation or train")
    from llmtrain.study.law.curves import LossKind, read_curve
    from llmtrain.study.law.fitted import fit_curves
    from llmtrain.study.law.kept import report, write_law

    kind = cast(LossKind, loss)
    fitted, unseen = ([read_curve(path, warmup, burn_in, kind) for path in paths] for paths in (runs, test or []))
    found = report(fit_curves(fitted), fitted, unseen)
    if out is not None:
        write_law(found, out)
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        _print_fit(found)
    _wrote(out, as_json)


@law_app.command(epilog="Example: llmtrain law predict --law runs/law.json --schedule linear --schedule wsd:decay=10%")
def predict(
    law: LawFile,
    schedule: Annotated[
        list[str] | None,
        typer.Option("--schedule", metavar="NAME|FILE", help="cosine, wsd:decay=10%, run.yaml; repeatable. [a choice]"),
    ] = None,
    peak: Annotated[float | None, typer.Option(help="Largest learning rate. [as fitted]", metavar="LR")] = None,
    warmup: Warmup = None,
    horizon: Horizon = None,
    floor: Floor = None,
    convention: Annotated[str | None, typer.Option(help="Count updates as hf, olmo, ... do.", metavar="WHOSE")] = None,
    tokens_per_update: Annotated[str | None, typer.Option(help="Global batch.", metavar="N")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="For all that have this KEY.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the predicted curves.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Rank schedules by the loss they would end at."""
    from llmtrain.study.law.kept import read_law
    from llmtrain.study.law.ranking import COMMON, asked, rank, ranking_json, write_curves

    fields = {"peak": peak, "warmup": warmup, "horizon": horizon, "floor": floor, "convention": convention}
    words = [f"schedule.{key}={value}" for key, value in fields.items() if value is not None]
    fitted = read_law(law)
    ranked = rank(fitted, asked(fitted, schedule or COMMON, [*words, *(overrides or [])], tokens_per_update))
    if csv is not None:
        write_curves(fitted, ranked, csv)
    found = ranking_json(fitted, ranked)
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        _print_ranking(found)
    _wrote(csv, as_json)


@law_app.command(epilog='Example: llmtrain law optimise --law runs/law.json --horizon "20000 steps" --out best.yaml')
def optimise(
    law: LawFile,
    warmup: Warmup = None,
    horizon: Horizon = None,
    floor: Floor = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the schedule section.")] = None,
    as_json: Json = False,
) -> None:
    """The falling schedule that the law likes best, as a `piecewise` section for a config."""
    from llmtrain.study.law.kept import read_law
    from llmtrain.study.law.optimise import length_in_updates, section_yaml, write_section
    from llmtrain.study.law.optimise import optimise as search
    from llmtrain.study.law.ranking import ranking_json

    fitted = read_law(law)
    covers = fitted.range
    best = search(
        fitted,
        covers.updates if horizon is None else length_in_updates(fitted, "--horizon", horizon),
        covers.warmup if warmup is None else length_in_updates(fitted, "--warmup", warmup),
        covers.lowest if floor is None else floor,
    )
    if out is not None:
        write_section(best.section, out)
    ranking = ranking_json(fitted, best.ranked)
    gain = {"over": best.rival, "nats": best.gain, "interval": list(best.interval), "told_apart": best.resolved}
    if as_json:
        print(json.dumps({"schedule": best.section, "gain": gain, **ranking}, allow_nan=False))
    else:
        _print_ranking(ranking)
        print(f"gain over {best.rival}: {best.gain:.4f} nats (95 %: {best.interval[0]:.4f} to {best.interval[1]:.4f})")
        if not best.resolved:
            print("that is too small to be told from the errors of the law: take the simpler schedule")
        print(section_yaml(best.section), end="")
    _wrote(out, as_json)


def _wrote(path: Path | None, as_json: bool) -> None:
    if path is not None:
        print(f"wrote {path}", file=sys.stderr if as_json else sys.stdout)


def _print_fit(found: dict[str, Any]) -> None:
    rows = [(found["law"], found), *found["laws"].items()]
    print("mean and worst relative error, in percent")
    lines = [["law", "fitted", "worst", "unseen", "worst", "parameters"]]
    for name, one in rows:
        errors = [text for part in (one["train"], one["test"]) for text in _percents(part)]
        lines.append([name, *errors, ", ".join(f"{key} {value:.4g}" for key, value in one["parameters"].items())])
    _print_table(lines)
    if found["test"] is not None:
        print(
            f"\nunseen runs, by {found['law']}; their 95 % intervals cover {found['test']['covered_by_95_percent']:.1%}"
        )
        marks = found["test"]["doubts"]
        lines = [["run", "mean %", "worst %", "final, nats", "marks"]]
        for name, one in found["test"]["curves"].items():
            lines.append([name, *_percents(one), f"{one['final_error']:+.4f}", ", ".join(marks[name])])
        _print_table(lines)
    print(f"\nleft out in turn, a run is missed by {found['left_out']['mean']:.4f} nats on average")
    print(f"differences below {found['resolvable']:.4f} nats between two schedules mean nothing")
    _print_doubts(found["doubts"])


def _print_ranking(found: dict[str, Any]) -> None:
    lines = [["schedule", "updates", "loss", "+-", "above best", "momentum law", "marks"]]
    for one in found["schedules"]:
        marks = ", ".join(doubt["name"] for doubt in one["doubts"])
        if one["loss"] is None:
            lines.append([one["schedule"], f"{one['updates']:,}", "refused", "", "", "", marks])
            continue
        half = one["interval"][1] - one["loss"]
        above = f"{one['above_best']:.4f}" + ("" if one["told_apart"] else " ~")
        second = "" if one["momentum_loss"] is None else f"{one['momentum_loss']:.4f}"
        lines.append(
            [one["schedule"], f"{one['updates']:,}", f"{one['loss']:.4f}", f"{half:.4f}", above, second, marks]
        )
    _print_table(lines)
    print(f"~ within {found['resolvable']:.4f} nats of the best, which the law cannot tell apart")
    for one in found["schedules"]:
        _print_doubts(one["doubts"], one["schedule"] + ": ")


def _percents(part: dict[str, Any] | None) -> tuple[str, str]:
    if part is None:
        return "", ""
    return f"{part['mean_relative_error']:.3%}"[:-1], f"{part['worst_relative_error']:.3%}"[:-1]


def _print_doubts(doubts: Sequence[dict[str, Any]], before: str = "") -> None:
    for doubt in doubts:
        print(f"{'refused' if doubt['refuses'] else 'warning'}: {before}{doubt['text']} ({doubt['name']})")


def _print_table(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        first, *rest = line
        cells = [text.rjust(width) for text, width in zip(rest[:-1], widths[1:-1], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells, rest[-1]]).rstrip())
