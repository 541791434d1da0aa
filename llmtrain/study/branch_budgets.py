"""What do cooldowns for several budgets from one trunk need, cost and save?

A budget D is a whole run: the trunk to (1 - f) D, then a cooldown over f D. One trunk serves all budgets and all k
shapes, so they cost (1 - f) D_max + k f (D_1 + ... + D_m) instead of k (D_1 + ... + D_m) for runs of their own (Hagele
2024, arXiv:2405.18392). Costs count updates. Every cooldown starts from the checkpoint of exactly its update.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.config import Config
from llmtrain.errors import CheckpointError, DataError, ScheduleError
from llmtrain.schedules import Schedule
from llmtrain.study.branch import Branch, Trunk, branch
from llmtrain.study.branch_cooldown import Parent, clock, cooldown, cooldown_length, scale
from llmtrain.train.metrics import read_metrics
from llmtrain.units import Length

_MOST_SAVES = 200  # of a trunk; where the updates wanted share no larger step, other budgets do
_NEAR = 0.01  # how far such budgets may be from those asked for


class Wanted(NamedTuple):
    """One budget with one shape."""

    budget: str  # as written
    shape: str
    branch: Branch


class Cost(NamedTuple):
    """Updates."""

    trunk: int
    branches: int
    separate: int  # of runs of their own

    @property
    def saved(self) -> float:
        """The share of the separate runs that is not spent."""
        return 1 - (self.trunk + self.branches) / self.separate


class Result(NamedTuple):
    """What a branch came to."""

    updates: int  # it made
    finished: bool
    loss: float | None  # of its last validation, in nats per token


@dataclass(frozen=True)
class Plan:
    """Branches from one trunk, in the order of budgets and shapes as written."""

    trunk: Trunk
    wanted: list[Wanted]

    @property
    def steps(self) -> list[int]:
        """The updates that cooldowns start after, rising."""
        return sorted({one.branch.parent.step for one in self.wanted})

    @property
    def missing(self) -> list[int]:
        """Those that the trunk has no checkpoint of."""
        return [step for step in self.steps if step not in self.trunk.saved]

    @property
    def cost(self) -> Cost:
        """As planned."""
        own = sum(one.branch.last - one.branch.parent.step for one in self.wanted)
        return Cost(self.steps[-1], own, sum(one.branch.last for one in self.wanted))


def plan_budgets(
    trunk: Trunk,
    budgets: Sequence[str],
    shapes: Sequence[str],
    length: str,
    prefix: str | None = None,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """A branch for every budget (`1B`, tokens where no unit is written) and shape, in `folder` or beside the trunk.

    `length` is that of every cooldown, `20%` of the budget or `500 steps`. A checkpoint that is missing is no error
    here. Raises LlmtrainError.
    """
    if not budgets or not shapes:
        raise ScheduleError("name at least one of --budgets and of --shapes, for example --budgets 1B,2B")
    cooled = cooldown_length(length)
    above = folder if folder is not None else Path(trunk.run).parent
    wanted = []
    for budget in dict.fromkeys(budgets):
        for shape in dict.fromkeys(shapes):
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{prefix or trunk.config.run.name}_{budget}_{shape}")
            parent, schedule = _cooled(trunk, budget, shape, cooled)
            wanted.append(Wanted(budget, shape, branch(parent, schedule, name, above / name, overrides)))
    return Plan(trunk, wanted)


def remedies(found: Plan, length: str) -> list[str]:
    """What is missing for the plan, and what to do about it, a sentence each; none where every checkpoint is there."""
    trunk, steps, missing = found.trunk, found.steps, found.missing
    if not missing:
        return []
    there = ", ".join(map(str, trunk.saved)) if trunk.saved else "none so far"
    lines = [f"{trunk.run} has no checkpoint of {_updates(missing)} (it has: {there})."]
    end = trunk.config.last_update
    if not trunk.saved and _kept(trunk.config).issuperset(steps):
        return [*lines, "By its config it will have them: train it."]
    if end < steps[-1]:
        lines.append(
            f"It ends with update {end}: train it to update {steps[-1]} at least, by run.stop_at or a longer horizon."
        )
    every = math.gcd(*steps)
    if steps[-1] // every <= _MOST_SAVES:
        lines.append(f"A trunk that keeps these is trained with {_keeping(every)}.")
        return lines
    lines.append(f"{_updates(steps).capitalize()} have no larger step in common than {every}.")
    near = _common_step(steps)
    if near is not None:
        cooled = cooldown_length(length)
        ends = [_whole(round(step / near) * near, cooled, trunk.config) for step in steps]
        lines.append(f"Budgets of {', '.join(f'{end} steps' for end in ends)} need a trunk with {_keeping(near)} only.")
    return lines


def require_checkpoints(found: Plan, length: str) -> None:
    """Raise CheckpointError where the trunk lacks a checkpoint."""
    if found.missing:
        raise CheckpointError("\n".join(remedies(found, length)))


def result(one: Branch) -> Result:
    """What the branch has come to so far."""
    try:
        rows = read_metrics(one.folder)
    except DataError:
        return Result(0, False, None)
    last = [row for row in rows if row["kind"] == "validation" and row["set"] == "validation"][-1:]
    made = sum(row["kind"] == "step" for row in rows)
    return Result(made, any(row["step"] >= one.last for row in last), last[0]["loss"] if last else None)


def measured(found: Plan) -> Cost | None:
    """The cost in updates that were made, by the rows of metrics.jsonl; None while a branch is not finished.

    Of the trunk those through the last update branched from count. Separate runs would have made all of theirs.
    """
    results = [result(one.branch) for one in found.wanted]
    if not all(one.finished for one in results):
        return None
    rows = read_metrics(Path(found.trunk.run))
    trunk = sum(row["kind"] == "step" and row["step"] <= found.steps[-1] for row in rows)
    return Cost(trunk, sum(one.updates for one in results), found.cost.separate)


def _cooled(trunk: Trunk, budget: str, shape: str, cooled: Length) -> tuple[Parent, dict[str, Any]]:
    """The trunk where the cooldown of a budget starts, and the schedule of that branch."""
    before = trunk.known
    end = scale(before, trunk.config, 0).measure(_budget(budget))
    start = end - scale(before, trunk.config, end).measure(cooled)
    step = _update_by(before, start)
    if step < max(1, before.warmup_updates):
        raise ScheduleError(
            f"--budgets {budget}: a cooldown of {cooled} would start after update {step}, and the warm-up of "
            f"{trunk.run} ends at {before.warmup_updates}: write a larger budget, or a shorter --cooldown"
        )
    parent = trunk.after(step) if step in trunk.saved else trunk.expected_after(step)
    return parent, cooldown(parent, shape, start, end)


def _budget(written: str) -> Length:
    """`1B`, `1B tokens` or `2000 steps`."""
    text = written.strip()
    try:
        length = Length.parse(text if re.search(r"(steps?|tokens?|%)$", text) else f"{text} tokens")
    except ValueError as error:
        raise ScheduleError(f"--budgets {written}: {error}") from None
    if length.unit not in ("steps", "tokens") or length.value == 0:
        raise ScheduleError(f'--budgets {written}: wanted tokens or updates, for example 1B or "2000 steps"')
    return length


def _update_by(before: Schedule, start: int) -> int:
    """The last update whose position is at most `start`."""
    return clock(before).update_at(start + 1) - 1 if start >= 0 else 0


def _common_step(steps: Sequence[int]) -> int | None:
    """The largest step that has a multiple within 1 % of each."""
    for parts in range(1, _MOST_SAVES):
        every = round(steps[0] / parts)
        if every > 0 and all(abs(step - round(step / every) * every) <= _NEAR * step for step in steps):
            return every
    return None


def _whole(start: int, cooled: Length, config: Config) -> int:
    """The updates of a run whose cooldown starts after update `start`."""
    if cooled.unit == "percent":
        return math.ceil(start / (1 - Fraction(str(cooled.value)) / 100))
    return start + cooled.updates(config.batch.tokens)


def _kept(config: Config) -> set[int]:
    """The updates whose checkpoints a run has when it is at its end."""
    end, settings = config.last_update, config.checkpoint
    every = end if settings.every is None else config.updates(settings.every)
    saved = [*range(every, end, every), end]
    always = end if settings.keep_every is None else config.updates(settings.keep_every)
    return {*saved[-settings.keep :], *(step for step in saved if step % always == 0)}


def _keeping(every: int) -> str:
    return f'--set "checkpoint.every={every} steps" --set "checkpoint.keep_every={every} steps"'


def _updates(steps: Iterable[int]) -> str:
    return "updates " + ", ".join(map(str, steps))
