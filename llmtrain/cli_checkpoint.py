"""`llmtrain checkpoint` and `llmtrain verify-resume`: can what was saved be trusted, moved, and gone on from?"""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from llmtrain.checkpoint.inspect import Row
    from llmtrain.train.verify_findings import Finding

checkpoint_app = typer.Typer(
    help="Look at the checkpoints of a run, check, compare and move them.", no_args_is_help=True, rich_markup_mode=None
)

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Json = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]


@checkpoint_app.command("list", epilog="Example: llmtrain checkpoint list runs/demo_cosine")
def list_(run: RunDir, as_json: Json = False) -> None:
    """What is saved, newest first: published, unfinished, set aside as broken or superseded."""
    from llmtrain.checkpoint.inspect import list_checkpoints

    rows = list_checkpoints(run)
    if as_json:
        print(json.dumps([row._asdict() for row in rows]))
        return
    columns = ("step", "state", "tokens", "lr", "size", "saved", "attempt", "engine")
    table = _table(*columns, right=("step", "tokens", "lr", "size", "attempt"))
    for row in rows:
        table.add_row(*_listed(row))
    _print(table)


@checkpoint_app.command(epilog="Example: llmtrain checkpoint check runs/demo_cosine")
def check(
    run: RunDir,
    step: Annotated[int | None, typer.Option(help="One checkpoint; by default all.")] = None,
    as_json: Json = False,
) -> None:
    """Hash every file of every published checkpoint. Exit code 1 where something is wrong."""
    from llmtrain.checkpoint.inspect import check_run

    with _progress("hashing") as on_hashed:
        names, faults = check_run(run, step, on_hashed)
    if as_json:
        print(json.dumps({"checked": names, "faults": [fault._asdict() for fault in faults]}))
    else:
        for fault in faults:
            print(": ".join(part for part in fault if part))
        print(f"{len(names)} checkpoint{'s' * (len(names) != 1)} checked, {len(faults)} faults")
    if faults:
        raise typer.Exit(1)


@checkpoint_app.command(epilog="Example: llmtrain checkpoint diff runs/a@1000 runs/b@1000")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="RUN@STEP, or a checkpoint's folder or URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    as_json: Json = False,
) -> None:
    """Where two checkpoints differ: state.json by dotted name, tensors by the largest difference. Exit code 1 then."""
    from llmtrain.checkpoint.inspect import diff as compare
    from llmtrain.checkpoint.inspect import open_named

    values, tensors = compare(open_named(a), open_named(b))
    if as_json:
        named = [{"name": name, "a": old, "b": new} for name, old, new in values]
        print(json.dumps({"state": named, "tensors": [tensor._asdict() for tensor in tensors]}))
    else:
        for name, old, new in values:
            print(f"{name}: {old!r} | {new!r}")
        if tensors:
            table = _table("tensor", "kind", "elements", "largest difference", right=("elements", "largest difference"))
            for tensor in tensors:
                largest = "other sizes" if tensor.largest is None else f"{tensor.largest:.3e}"
                table.add_row(tensor.name, tensor.kind, f"{tensor.elements:,}", largest)
            _print(table)
        print(f"{len(values)} values and {len(tensors)} tensors differ")
    if values or tensors:
        raise typer.Exit(1)


@checkpoint_app.command(epilog="Example: llmtrain checkpoint convert runs/demo_cosine@160 s3://bucket/demo --ranks 1")
def convert(
    source: Annotated[str, typer.Argument(metavar="RUN@STEP", help="Or a checkpoint's folder or URL.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A folder of checkpoints, or any fsspec URL.")],
    ranks: Annotated[int, typer.Option(min=1, help="The number of files to cut it into.")] = 1,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint again elsewhere, in another number of files. Train on from it with --resume."""
    from llmtrain.checkpoint.convert import convert as convert_checkpoint

    with _progress("writing") as on_written:
        there = convert_checkpoint(source, destination, ranks, on_written)
    if as_json:
        print(json.dumps({"checkpoint": there, "ranks": ranks}))
    else:
        print(f"wrote {there}: {ranks} file{'s' * (ranks > 1)}; go on from it with --resume {there}")


def verify_resume(
    config: Annotated[Path, typer.Option("--config", "-c", help="The YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, e.g. optim.clip=0.5.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="ENGINE", help="single, fsdp, deepspeed or zero0..3; the config's.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes; 1 for single, else every GPU, or 2 on a CPU.")
    ] = None,
    at: Annotated[int, typer.Option(help="The update after which it is interrupted.")] = 5,
    steps: Annotated[int, typer.Option(help="The update it ends with.")] = 10,
    to_engine: Annotated[str | None, typer.Option(metavar="ENGINE", help="Resume on this engine.")] = None,
    to_ranks: Annotated[int | None, typer.Option(min=1, help="Resume on this number of processes.")] = None,
    as_configured: Annotated[
        bool, typer.Option("--as-configured", help="Leave engine.deterministic as it is; else true.")
    ] = False,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder for the legs, kept.")] = None,
    as_json: Json = False,
) -> None:
    """Train a few updates straight, and again interrupted and resumed; name the first component that differs."""
    from llmtrain.config_file import load_config
    from llmtrain.train.verify import Layout, verify

    loaded = load_config(config, overrides)
    straight = Layout.of(loaded, engine, ranks)
    resumed = straight
    if to_engine is not None:
        resumed = Layout.of(loaded, to_engine, None)
        resumed = resumed._replace(ranks=1 if resumed.engine == "single" else straight.ranks)
    if to_ranks is not None:
        resumed = resumed._replace(ranks=to_ranks)
    data = [text for text in overrides or [] if text.startswith(("data.", "model."))]
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="llmtrain-verify-") as folder:
        result = verify(
            loaded,
            Path(folder),
            prepare_command=shlex.join(["llmtrain", "prepare", "--config", str(config), *_each("--set", data)]),
            straight=straight,
            resumed=resumed,
            at=at,
            steps=steps,
            say=lambda text: print(text, file=sys.stderr, flush=True),
            as_configured=as_configured,
        )
    if as_json:
        print(json.dumps(result.as_json(), allow_nan=False))
    else:
        table = _table("component", "first difference", "largest difference", "bound", "verdict")
        for finding in result.findings:
            table.add_row(*_found(finding))
        _print(table)
        if result.note:
            print(result.note)
        print(result.verdict)
    if result.differs:
        raise typer.Exit(1)


def _each(option: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _listed(row: "Row") -> tuple[str, ...]:
    def shown(value: Any, form: str = "") -> str:
        return "" if value is None else format(value, form)

    kind = f"{row.state}, ephemeral" if row.ephemeral else row.state
    saved = "" if row.saved is None else datetime.fromisoformat(row.saved).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    ranks = "" if row.ranks is None else f" x {row.ranks}"
    return (
        str(row.step),
        kind,
        shown(row.tokens, ","),
        shown(row.lr, ".6e"),
        f"{row.bytes / 2**20:,.1f} MiB",
        saved,
        shown(row.attempt),
        shown(row.engine) + ranks,
    )


def _found(finding: "Finding") -> tuple[str, ...]:
    where = "" if finding.update is None else f"update {finding.update}: {finding.first}"
    largest = "none" if finding.update is None else f"{finding.largest:.2e} {finding.unit}"
    bound = f"{finding.bound:g}" if finding.bound else "exact"
    verdict = "DIFFERS" if not finding.ok else "same" if finding.update is None else "within"
    return finding.component, where, largest, bound, verdict


def _table(*columns: str, right: tuple[str, ...] = ()) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name != "first difference")
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr, moved by `(done, total)`."""
    from llmtrain.checkpoint.files import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
