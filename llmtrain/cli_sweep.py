"""`llmtrain sweep`: train every run of a study, and compare them. No torch here: each run is a process of its own."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmtrain.study.sweep import Job
    from llmtrain.study.sweep_file import Planned


def sweep(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The file of the study.")],
    at_once: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs that train at the same time. [the study's]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override in the study, for example grid.seeds=[1]."),
    ] = None,
    only: Annotated[
        int | None, typer.Option(metavar="INDEX", help="Train this run alone, from 1: an element of a job array.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Train the runs of a study that are not finished yet, and compare all. Start it again after any interruption."""
    from llmtrain.study.sweep_file import plan_study
    from llmtrain.study.sweep_state import check_study, hold_study, state_of

    planned = plan_study(study, overrides)
    if only is not None and not 1 <= only <= len(planned.runs):
        raise typer.BadParameter(f"--only {only}: the runs of {study} are numbered 1 to {len(planned.runs)}")
    many = 1 if only is not None else min(at_once or planned.study.at_once, len(planned.runs))
    if dry_run:
        states = [state_of(run) for run in planned.runs]
        check_study(planned, states, many)
        _print_plan(planned, states, many, as_json)
        return
    with hold_study(planned.study.folder, shared=only is not None) as held:
        _sweep(planned, only, many, held, as_json)


def _sweep(planned: "Planned", only: int | None, at_once: int, held: int, as_json: bool) -> None:
    from rich.console import Console

    from llmtrain.device import usable_cores
    from llmtrain.study.launch import gpus, start_training
    from llmtrain.study.sweep import sweep as train_runs
    from llmtrain.study.sweep_shown import SweepShown
    from llmtrain.study.sweep_state import check_study, state_of, write_study

    states = [state_of(run) for run in planned.runs]
    check_study(planned, states, at_once)
    write_study(planned)
    console = Console(stderr=as_json)
    console.print(_summary(planned, states, at_once), highlight=False, soft_wrap=True)
    threads = max(1, usable_cores() // at_once)
    devices = gpus() if at_once > 1 else []

    def start(config: Path, log: Path, slot: int) -> Any:
        gpu = devices[slot % len(devices)] if devices else None
        return start_training(config, threads, log, gpu=gpu, kept_open=[held])

    runs = planned.runs if only is None else [planned.runs[only - 1]]
    with SweepShown(console) as shown:
        jobs, signal = train_runs(runs, at_once, start, shown)
    reports = [] if signal else _report(planned, as_json, whole=only is None)
    if as_json:
        print(json.dumps(_outcome(planned, jobs, signal, reports)))
    _say_how_it_ended(planned, jobs, signal, console)
    if any(job.stage == "failed" for job in jobs):
        raise typer.Exit(1)


def _report(planned: "Planned", as_json: bool, *, whole: bool) -> list[Path]:
    """Compare what there is, once all runs were tried. A single run reports where it was the last of its study."""
    from llmtrain.errors import DataError
    from llmtrain.study.compare import compare
    from llmtrain.study.report_printed import print_report
    from llmtrain.study.sweep import write_reports
    from llmtrain.study.sweep_state import state_of

    if not whole and any(state_of(run) != "finished" for run in planned.runs):
        return []
    try:
        comparison = compare([planned.study.folder])
    except DataError as error:
        print(f"nothing to compare: {error}", file=sys.stderr)
        return []
    paths = write_reports(comparison, planned.study.folder)
    if not as_json:
        print_report(comparison, schedules=True)
        for path in paths:
            print(f"wrote {path}")
    return paths


def _say_how_it_ended(planned: "Planned", jobs: "Sequence[Job]", signal: str, console: Any) -> None:
    from llmtrain.study.sweep import LOG_FILE

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for job in jobs:
        if job.stage == "failed":
            say(f"FAILED run {job.run.index} {job.run.name}, exit code {job.exit_code}; its log ends:")
            for line in job.log_end():
                say(f"  | {line}")
            say(f"  all of it: {job.run.folder / LOG_FILE}")
    stopped = [job.run.name for job in jobs if job.stage == "stopped"]
    finished = sum(job.stage == "finished" for job in jobs)
    counted = f"{finished} of {len(jobs)} runs finished"
    if signal:
        say(f"STOPPED (signal {signal}): {counted}, {len(stopped)} saved; the same command goes on from here")
    elif stopped:
        say(f"{counted}; told to stop: {', '.join(stopped)}; the same command goes on from here")
    elif finished < len(jobs):
        say(f"{counted}, {len(jobs) - finished} failed; the same command tries these again")
    elif len(jobs) < len(planned.runs):
        say(f"FINISHED run={jobs[0].run.name}  {jobs[0].run.folder}")
    else:
        say(f"FINISHED study={planned.study.name}  {planned.study.folder}")


def _print_plan(planned: "Planned", states: Sequence[str], at_once: int, as_json: bool) -> None:
    from rich.console import Console

    from llmtrain.study.report_printed import PIPE_COLUMNS, print_table
    from llmtrain.study.sweep_shown import plan_table

    if as_json:
        print(json.dumps(_plan_json(planned, states, at_once)))
        return
    print(_summary(planned, states, at_once))
    print_table(Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS), plan_table(planned, states))


def _summary(planned: "Planned", states: Sequence[str], at_once: int) -> str:
    """What will run: of all runs, and of what is left of them."""
    from llmtrain.device import usable_cores

    runs = planned.runs
    left = [run for run, state in zip(runs, states, strict=True) if state != "finished"]
    cells = _count(len({run.cell for run in runs}), "cell")
    peaks = _count(len({run.schedule.peak for run in runs}), "peak")
    seeds = _count(len({run.config.run.seed for run in runs}), "seed")
    threads = max(1, usable_cores() // at_once)
    return (
        f"study {planned.study.name} in {planned.study.folder}: {len(runs)} runs of {cells}, {peaks}, {seeds}; "
        f"{len(runs) - len(left)} finished, {states.count('begun')} begun\n"
        f"to train: {_count(len(left), 'run')} of together {sum(run.updates for run in left):,} updates and "
        f"{sum(run.tokens for run in left):,} tokens, what was begun included; {at_once} at once, "
        f"{_count(threads, 'thread')} each"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _plan_json(planned: "Planned", states: Sequence[str], at_once: int) -> dict[str, Any]:
    return {
        "study": planned.study.name,
        "folder": str(planned.study.folder),
        "count": len(planned.runs),
        "at_once": at_once,
        "baseline": planned.baseline,
        "runs": [
            {
                "index": run.index,
                "name": run.name,
                "cell": run.cell,
                "state": state,
                "schedule": run.schedule.spec,
                "warmup": str(run.config.schedule.warmup),
                "peak": run.schedule.peak,
                "seed": run.config.run.seed,
                "updates": run.updates,
                "tokens": run.tokens,
                "area": run.area,
            }
            for run, state in zip(planned.runs, states, strict=True)
        ],
    }


def _outcome(planned: "Planned", jobs: "Sequence[Job]", signal: str, reports: Sequence[Path]) -> dict[str, Any]:
    return {
        "study": planned.study.name,
        "folder": str(planned.study.folder),
        "stopped_by": signal,
        "runs": [
            {
                "index": job.run.index,
                "name": job.run.name,
                "state": job.stage,
                "exit_code": job.exit_code,
                "update": job.update,
                "updates": job.run.updates,
                "loss": _loss(job),
            }
            for job in jobs
        ],
        "reports": [str(path) for path in reports],
    }


def _loss(job: "Job") -> float | None:
    """Of the last validation; None where there is none that is finite."""
    found = None if job.rows.validation is None else float(job.rows.validation["loss"])
    return found if found is not None and math.isfinite(found) else None
