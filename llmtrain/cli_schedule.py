"""`llmtrain schedule`: look at learning-rate schedules before paying for a run. No torch, so it answers at once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

schedule_app = typer.Typer(help="Look at learning-rate schedules before you spend.", no_args_is_help=True)


@schedule_app.command("list", epilog="Example: llmtrain schedule list")
def list_schedules() -> None:
    """Every registered schedule with its parameters."""
    from llmtrain.schedules import catalog

    for shape in catalog():
        parameters = ", ".join(name if p.required else f"{name}={p.default}" for name, p in shape.parameters.items())
        print(f"{shape.name:<14} {shape.doc.splitlines()[0]}" + (f"  [{parameters}]" if parameters else ""))


@schedule_app.command(epilog='Example: llmtrain schedule show cosine --peak 3e-4 --horizon "50000 steps" --floor 0.1')
def show(
    name: Annotated[str | None, typer.Argument(help="A registered schedule; see `llmtrain schedule list`.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Show the schedule of this run.")] = None,
    peak: Annotated[float, typer.Option(help="Largest learning rate.")] = 3e-4,
    warmup: Annotated[str, typer.Option(help='"2000 steps", "1%", "auto".')] = "1%",
    horizon: Annotated[str, typer.Option(help='"50000 steps", "100B tokens".')] = "10000 steps",
    floor: Annotated[float, typer.Option(help="Final multiplier of the peak.")] = 0.0,
    tokens_per_update: Annotated[int, typer.Option(help="Global batch, for lengths in tokens.")] = 4194304,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Shape parameter or config override.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print spec, summary and the LR of every update.")] = False,
) -> None:
    """The learning rate of every update, and what it amounts to."""
    import numpy as np

    from llmtrain.schedules.summary import summarize
    from llmtrain.study.schedule_view import summary_lines, terminal_plot

    if config is not None:
        written = _from_config(config, name, overrides or [])
    else:
        fields = {"peak": peak, "warmup": warmup, "horizon": horizon, "floor": floor}
        written = _from_words(name, fields, tokens_per_update, overrides or [])
    schedule, weight_decay, stop_at = written
    summary = summarize(schedule, weight_decay, stop_at)
    lrs = schedule.peak * schedule.multipliers(np.arange(1, summary.updates + 1))
    if as_json:
        facts = {"spec": schedule.spec, "hash": schedule.hash, "summary": asdict(summary), "lr": lrs.tolist()}
        print(json.dumps(facts))
        return
    print(terminal_plot(lrs))
    print("\n".join(summary_lines(schedule, summary)))


def _from_config(path: Path, name: str | None, overrides: list[str]) -> tuple[Any, float, int | None]:
    from llmtrain.config_file import load_config
    from llmtrain.schedules import plan

    loaded = load_config(path, [*overrides, *([f"schedule.name={name}"] if name else [])])
    schedule = plan(loaded.schedule, loaded.batch.tokens, loaded.optim.betas[1])
    stop_at = None if loaded.run.stop_at is None else loaded.last_update
    return schedule, loaded.optim.weight_decay, stop_at


def _from_words(
    name: str | None, fields: dict[str, Any], tokens_per_update: int, overrides: list[str]
) -> tuple[Any, float, int | None]:
    from llmtrain.config import ScheduleConfig
    from llmtrain.config_file import apply_override, read_section
    from llmtrain.errors import ConfigError
    from llmtrain.schedules import plan

    if name is None:
        raise ConfigError("name a schedule or a --config; `llmtrain schedule list` shows what there is")
    values: dict[str, Any] = {"name": name, **fields}
    for override in overrides:
        apply_override(values, override.removeprefix("schedule."))
    return plan(read_section(ScheduleConfig, values, "schedule"), tokens_per_update), 0.1, None
