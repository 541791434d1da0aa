"""`llmtrain slurm`: put a run into a cluster's queue, look after it, decide whether its job starts once more."""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.slurm.status import Status
    from llmtrain.slurm.submit import Submission

slurm_app = typer.Typer(
    help="Train on a Slurm cluster: submit, look at the attempts.", no_args_is_help=True, rich_markup_mode=None
)

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="The YAML file that describes the run.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, for example optim.clip=0.5.")
]


@slurm_app.command(epilog="Example: llmtrain slurm submit --config configs/7b_cosine.yaml --nodes 4 --dry-run")
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[str | None, typer.Option(metavar="N|MIN-MAX", help="Nodes. [the cluster file's]")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, metavar="G", help="0: one rank a node, on its CPUs. [the cluster file's]")
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="Limit of one start. [the cluster file's]")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What this cluster needs. [~/.config/llmtrain/cluster.yaml]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the script, do nothing.")] = False,
) -> None:
    """Check a run, copy its code and config into the run folder, and put it into the queue."""
    from llmtrain.config_file import load_config
    from llmtrain.errors import ConfigError
    from llmtrain.slurm.cluster_file import read_cluster, seconds_of
    from llmtrain.slurm.submit import prepare_submission
    from llmtrain.slurm.submit import submit as submit_job

    site = read_cluster(cluster)
    limit = time_limit or site.time
    try:
        seconds_of(limit)
    except ValueError as error:
        raise ConfigError(f"--time: {error}") from None
    given = "".join(f" --set {shlex.quote(text)}" for text in overrides or [] if text.startswith(("data.", "model.")))
    submission = prepare_submission(
        load_config(config, overrides),
        site,
        nodes=nodes or str(site.nodes),
        gpus=site.gpus_per_node if gpus_per_node is None else gpus_per_node,
        time_limit=limit,
        prepare_command=f"llmtrain prepare --config {config}{given}",
    )
    if dry_run:
        print(submission.script, end="")
        return
    _tell_submitted(submission, submit_job(submission), limit)


def _tell_submitted(submission: "Submission", job: str, limit: str) -> None:
    run_dir = submission.config.run.dir
    how = "as measured in earlier starts" if submission.measured else "until it was measured"
    print(f"job {job}: {submission.ranks}, {limit} a start, told to save {submission.lead_s} s before its end ({how})")
    print(f"look:    llmtrain slurm status {run_dir}")
    print(f"follow:  tail -F {run_dir}/slurm-{job}.out")
    print(f"stop:    touch {run_dir}/stop   (saves, and is not started again; scancel {job} leaves it 30 s for that)")


@slurm_app.command(epilog="Example: llmtrain slurm status runs/7b_cosine")
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Say what each start of a run made and lost, and when the run will be finished."""
    from llmtrain.slurm.status import status_of

    found = status_of(run)
    print(json.dumps(asdict(found))) if as_json else _print_status(found)


def _print_status(found: "Status") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("attempt", "job", "started", "nodes", "ranks", "updates", "lost", "ended"):
        table.add_column(name, justify="right" if name in ("attempt", "ranks", "lost") else "left")
    for attempt in found.attempts:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.started))
        job = f"{attempt.job or '-'}{f' restart {attempt.restart}' if attempt.restart else ''}"
        made = f"{attempt.first + 1}..{attempt.last}" if attempt.last > attempt.first else "none"
        ended = "runs, or was killed" if attempt.outcome == "open" else f"{attempt.outcome} {attempt.reason}".strip()
        table.add_row(
            str(attempt.number),
            job,
            started,
            ",".join(attempt.hosts),
            str(attempt.ranks),
            made,
            str(attempt.lost),
            ended,
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    loss = "" if found.loss is None else f"  loss {found.loss:.4f}"
    print(f"{found.run}: update {found.update} of {found.updates}{loss}{_remaining(found)}")
    for mistake in found.mistakes:
        print(f"a start failed: {mistake}")


def _remaining(found: "Status") -> str:
    if found.finished:
        return "  finished"
    if found.remaining_s is None:
        return ""
    hours, minutes = divmod(round(found.remaining_s) // 60, 60)
    return f"  {found.seconds_per_update:.2f} s an update, {hours}:{minutes:02d} h of training left"


@slurm_app.command(
    hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def again(
    config: ConfigPath,
    overrides: Overrides = None,
    code: Annotated[int, typer.Option(help="The exit code of the job's tasks.")] = 0,
    attempts: Annotated[int, typer.Option(help="Starts of one job, at most.")] = 20,
    resume: str = "auto",
) -> None:
    """For batch scripts: print "end", or "again" and the nodes to do without."""
    from llmtrain.config_file import load_config
    from llmtrain.errors import ConfigError, EnvironmentError
    from llmtrain.slurm.again import Verdict, decide
    from llmtrain.train.attempts import job_of

    place = job_of(os.environ)
    if place is None:
        raise EnvironmentError("llmtrain slurm again is for batch scripts: SLURM_JOB_ID is not set")
    job, restart = place
    try:
        run_dir = Path(load_config(config, overrides).run.dir)
    except ConfigError:
        verdict = Verdict(False, "the config is refused: see the message above")
    else:
        verdict = decide(run_dir, job, restart, code, attempts)
    if verdict.again and resume not in ("auto", "must"):
        verdict = Verdict(False, f"--resume {resume} would go back each time; submit it without to go on from here")
    print(f"job {job}: {'started again' if verdict.again else 'ends here'}: {verdict.why}", file=sys.stderr)
    print(" ".join(["again", ",".join(verdict.without)]).strip() if verdict.again else "end")
