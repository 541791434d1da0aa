"""Which schedules are looked at together, and what is there to see of each?

Names share one peak, warm-up, horizon and floor; beside a config they take those of the first config. A parameter goes
to the schedules that have it. What is written behind a name, `wsd:decay=10%:cooldown=1-sqrt`, is for that one alone.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config import Config, ScheduleConfig
from llmtrain.config_file import apply_override, load_config, read_section
from llmtrain.errors import ConfigError, ScheduleError
from llmtrain.schedules import Schedule, plan
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.schedules.registry import load_module, shape_named
from llmtrain.schedules.summary import Summary, ema_coefficients, summarize
from llmtrain.units import parse_batch_tokens

DEFAULTS = {"peak": 3e-4, "warmup": "1%", "horizon": "10000 steps", "floor": 0.0}
_EVEN_POINTS = 1500  # of a curve that is drawn
_BENDS = 60  # sharpest turns of a curve, drawn whatever the even points are


@dataclass(frozen=True)
class Shown:
    """One schedule, with what a preview needs to know of the run around it."""

    label: str
    schedule: Schedule
    summary: Summary
    weight_decay: float
    tokens_per_update: int | None  # None where neither a config nor the user says

    @property
    def updates(self) -> int:
        """Updates that are drawn: to the horizon or the end of the run, whichever is later."""
        return max(self.schedule.total_updates, self.summary.updates)

    def lrs(self) -> FloatArray:
        """The learning rate of updates 1 to `updates`."""
        return self.schedule.peak * self.schedule.multipliers(np.arange(1, self.updates + 1))

    def coefficients(self) -> FloatArray:
        """How much of each update the final weights hold; see `ema_coefficients`. As long as the run."""
        return ema_coefficients(self.lrs()[: self.summary.updates], self.weight_decay)


@dataclass
class _Wanted:
    """A schedule before it is planned."""

    label: str
    values: dict[str, Any]
    own: list[str]  # overrides for this one alone
    run: Config | None


def look_at(
    names: Sequence[str],
    configs: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    tokens_per_update: str | None = None,
    weight_decay: float | None = None,
) -> list[Shown]:
    """Plan every config and then every name. `overrides` are KEY=VALUE of the schedule, or of a config with a dot."""
    if not names and not configs:
        raise ConfigError("name a schedule or a --config; `llmtrain schedule list` shows what there is")
    of_schedule, of_run = _split(overrides, bool(configs))
    runs = [
        load_config(path, [*of_run, *(f"schedule.{text}" for text in of_schedule if _is_field(text))])
        for path in configs
    ]
    wanted = [_Wanted(run.run.name, dict(run.schedule), [], run) for run in runs]
    wanted += [_from_name(name, runs[0] if runs else None) for name in names]
    for one in wanted:
        _load_modules(one, of_schedule)
    owned = {key for one in wanted for key in shape_named(one.values["name"]).parameters}
    labels = [one.label for one in wanted]
    shown = []
    for index, one in enumerate(wanted):
        parameters = shape_named(one.values["name"]).parameters
        for text in of_schedule:
            if _key(text) in parameters or _key(text) not in owned:
                apply_override(one.values, text)
        for text in one.own:
            apply_override(one.values, text)
        again = labels[:index].count(one.label)
        label = f"{one.label} ({again + 1})" if again else one.label
        shown.append(_plan(one, label, {_key(text) for text in of_schedule}, tokens_per_update, weight_decay))
    return shown


def section_of(item: str, run: Config) -> dict[str, Any]:
    """The `schedule` section that a name such as `wsd:decay=10%` stands for beside the config of a run."""
    one = _from_name(item, run)
    _load_modules(one, [])
    for text in one.own:
        apply_override(one.values, text)
    return one.values


def facts(shown: Shown) -> dict[str, Any]:
    """What `--json` prints of one schedule; `lr` is the learning rate of update 1, 2 and so on."""
    summary = asdict(shown.summary)
    return {
        "name": shown.label,
        "spec": shown.schedule.spec,
        "hash": shown.schedule.hash,
        "summary": {key: finite(value) if isinstance(value, float) else value for key, value in summary.items()},
        "weight_decay": shown.weight_decay,
        "tokens_per_update": shown.tokens_per_update,
        "lr": shown.lrs().tolist(),
        "ema_coefficients": shown.coefficients().tolist(),
    }


def finite(value: float | None) -> float | None:
    """The number, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def write_csv(shown: Sequence[Shown], path: Path) -> None:
    """One row an update and schedule, every digit of every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["schedule", "update", "tokens", "lr", "multiplier", "ema_coefficient"])
        for one in shown:
            writer.writerows(_rows(one))


def drawn_updates(shown: Sequence[Shown]) -> IntArray:
    """Updates at which curves are drawn: all of a short run; of a long one even steps, both ends, peaks and kinks."""
    kept = [np.array([1, 2, 3])]
    for one in shown:
        last, schedule = one.updates, one.schedule
        kept.append(np.unique(np.linspace(1, last, min(last, _EVEN_POINTS)).round().astype(np.int64)))
        for place in (one.summary.peak_update, schedule.warmup_updates, schedule.total_updates, one.summary.updates):
            kept.append(np.array([place - 1, place, place + 1]))
        kept.append(np.array([last - 2, last - 1, last]))
        if last > _EVEN_POINTS:
            bends = np.abs(np.diff(one.lrs(), 2))
            sharpest = np.argpartition(bends, -_BENDS)[-_BENDS:]  # bend i lies at update i + 2
            kept += [sharpest + 1, sharpest + 2, sharpest + 3]
    every = np.unique(np.concatenate(kept))
    return every[(every >= 1) & (every <= max(one.updates for one in shown))]


def shared_tokens(shown: Sequence[Shown]) -> int | None:
    """Tokens per update, where it is known and the same for all."""
    found = {one.tokens_per_update for one in shown}
    return found.pop() if len(found) == 1 else None


def _rows(one: Shown) -> Iterator[tuple[Any, ...]]:
    multipliers = one.schedule.multipliers(np.arange(1, one.updates + 1)).tolist()
    coefficients = one.coefficients().tolist()
    for index, lr in enumerate(one.lrs().tolist()):
        tokens = "" if one.tokens_per_update is None else (index + 1) * one.tokens_per_update
        coefficient = coefficients[index] if index < len(coefficients) else ""
        yield one.label, index + 1, tokens, lr, multipliers[index], coefficient


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _is_field(override: str) -> bool:
    return _key(override) in ScheduleConfig.model_fields


def _split(overrides: Sequence[str], has_config: bool) -> tuple[list[str], list[str]]:
    """Overrides of the schedule, without their prefix, and those of the rest of a config."""
    plain = [text.strip().removeprefix("schedule.") for text in overrides]
    of_run = [text for text in plain if "." in _key(text)]
    if of_run and not has_config:
        raise ConfigError(f"--set {of_run[0]}: {_key(of_run[0])} belongs to a config; give one with --config")
    return [text for text in plain if "." not in _key(text)], of_run


def _from_name(item: str, run: Config | None) -> _Wanted:
    name, *own = item.split(":")
    values = dict(DEFAULTS) if run is None else dict(run.schedule)
    values["name"] = name
    return _Wanted(" ".join([name, *own]), values, own, run)


def _load_modules(one: _Wanted, overrides: list[str]) -> None:
    """Run the user's file, so that its shapes have names; drop what only the config's own shape knows."""
    for text in [*overrides, *one.own]:
        if _key(text) == "module":
            apply_override(one.values, text)
    if "module" in one.values:
        load_module(str(one.values["module"]))
    shape = shape_named(one.values["name"])
    if one.run is not None and one.run.schedule.name != shape.name:
        for key in shape_named(one.run.schedule.name).parameters:
            if key not in shape.parameters:
                one.values.pop(key, None)


def _plan(one: _Wanted, label: str, written: set[str], tokens: str | None, weight_decay: float | None) -> Shown:
    run = one.run
    per_update = _tokens_per_update(tokens, run, one.values)
    config = read_section(ScheduleConfig, one.values, "schedule")
    stop_at = None
    if run is None:
        schedule = _plan_words(config, per_update, "warmup" in written or "warmup" in map(_key, one.own))
    else:
        schedule = plan(config, run.batch.tokens, run.optim.betas[1])
        stop_at = None if run.run.stop_at is None else run.last_update
    if weight_decay is None:
        weight_decay = 0.1 if run is None else run.optim.weight_decay
    known = run is not None or tokens is not None or config.horizon.unit == "tokens"
    return Shown(
        label, schedule, summarize(schedule, weight_decay, stop_at), weight_decay, per_update if known else None
    )


def _plan_words(config: ScheduleConfig, per_update: int, warmup_written: bool) -> Schedule:
    """The default warm-up makes way for a shape that draws its own."""
    try:
        return plan(config, per_update)
    except ScheduleError:
        if warmup_written:
            raise
    return plan(config.model_copy(update={"warmup": type(config.horizon).parse(0)}), per_update)


def _tokens_per_update(written: str | None, run: Config | None, values: dict[str, Any]) -> int:
    if written is None:
        return parse_batch_tokens("4M") if run is None else run.batch.tokens
    if run is not None:
        raise ConfigError("--tokens-per-update: a config has its own batch; use --set batch.global_tokens=...")
    try:
        return parse_batch_tokens(int(written) if written.isdigit() else written)
    except ValueError as error:
        raise ConfigError(f"--tokens-per-update: {error}") from None
