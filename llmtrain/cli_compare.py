"""`llmtrain compare`: which schedule was better, and is that real? Reads run folders alone, without torch."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.study.compare import Comparison


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS|STUDY", help="Run folders, folders of them, or a study's file.")
    ],
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="A schedule or run to compare with. [the first]")
    ] = None,
    margin: Annotated[str, typer.Option(metavar="PERCENT", help="Of perplexity; less is no difference.")] = "0.5%",
    target: Annotated[
        float | None, typer.Option(metavar="LOSS", help="Say when each run first validated at this loss.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a figure.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page to send on.")] = None,
    md: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a row a validation.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Rank schedules by validation loss, where they may be ranked."""
    share = _percent(margin)
    from llmtrain.study.compare import compare as compare_runs
    from llmtrain.study.report_data import as_json as comparison_json
    from llmtrain.study.report_printed import print_report
    from llmtrain.study.sweep_file import read_study

    folders = [read_study(path).folder if path.suffix in (".yaml", ".yml") else path for path in runs]
    comparison = compare_runs(folders, baseline=baseline, margin=share, target=target)
    _write_files(comparison, png, html, md, csv)
    if as_json:
        print(json.dumps(comparison_json(comparison, speeds=True), allow_nan=False))
    else:
        print_report(comparison)
    for path in (png, html, md, csv):
        if path is not None:
            print(f"wrote {path}", file=sys.stderr if as_json else sys.stdout)


def _percent(text: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*%\s*", text)
    if found is None or not 0 < float(found[1]) < 100:
        raise typer.BadParameter(f'--margin "{text}": write a share of perplexity in percent, for example 0.5%')
    return float(found[1]) / 100


def _write_files(
    comparison: "Comparison", png: Path | None, html: Path | None, md: Path | None, csv: Path | None
) -> None:
    from llmtrain.errors import EnvironmentError
    from llmtrain.study.report import markdown
    from llmtrain.study.report_data import write_csv

    try:
        if png is not None:
            from llmtrain.study.figures import loss_and_lr

            loss_and_lr(comparison, png)
        if html is not None:
            from llmtrain.study.report_page import write_html

            write_html(comparison, html)
        if md is not None:
            md.parent.mkdir(parents=True, exist_ok=True)
            md.write_text(markdown(comparison), encoding="utf-8")
        if csv is not None:
            write_csv(comparison, csv)
    except OSError as error:
        raise EnvironmentError(f"cannot write {error.filename}: {error.strerror}") from None
