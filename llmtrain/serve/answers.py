"""What does the service answer? The same pure functions that training calls, and nothing computed twice.

Learning rates are those of update k, counted from 1; a number read back from the JSON is the library's double.
"""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pydantic_core

from llmtrain.schedules.exact import IntArray
from llmtrain.schedules.schedule import Schedule
from llmtrain.schedules.summary import summarize
from llmtrain.serve import limits
from llmtrain.serve.asked import Setting, read_comparison, read_rates, read_validation
from llmtrain.serve.configs import Planned, planned
from llmtrain.serve.refusals import Refusal, refuse


def lr_schedule(values: dict[str, Any]) -> bytes:
    """POST /lr_schedule: one learning rate, or those of many updates."""
    config, kind, points, setting = read_rates(values)
    schedule, digest = planned(config, setting)
    if kind == "step":
        return json.dumps({"learning_rate": _rate(schedule, points), "step": points, "hash": digest}).encode()
    updates = np.asarray(points if kind == "steps" else points.updates, np.int64)
    return pydantic_core.to_json(
        {"learning_rate": _rates(schedule, updates), "steps": updates.tolist(), "hash": digest}
    )


def is_large(values: dict[str, Any]) -> bool:
    """Whether POST /lr_schedule takes long enough to be answered beside the other requests."""
    asked = values.get("steps", values.get("range"))
    return isinstance(asked, dict) or (isinstance(asked, list) and len(asked) > limits.SMALL_POINTS)


def validate(values: dict[str, Any]) -> bytes:
    """POST /validate: whether a config can be planned, with every problem where not."""
    config, setting = read_validation(values)
    try:
        schedule, digest = planned(config, setting)
    except Refusal as refusal:
        errors = [problem.model_dump() for problem in refusal.problems]
        return json.dumps({"valid": False, "errors": errors}).encode()
    return json.dumps({"valid": True, "errors": [], "hash": digest, "spec": schedule.spec}).encode()


def compare(values: dict[str, Any]) -> bytes:
    """POST /compare: the summary and a drawn curve of every config, and what other frameworks make of its words."""
    asked, setting = read_comparison(values)
    labels = asked.labels or [str(config.get("name")) for config in asked.configs]
    found = []
    cost = 0
    for index, config in enumerate(asked.configs):
        where = f"configs[{index}]"
        own = planned(config, setting, where)
        others = {name: _by_convention(config, setting, name, where) for name in asked.conventions}
        cost += own.schedule.total_updates * (1 + sum(isinstance(other, Planned) for other in others.values()))
        if cost > limits.COMPARED_UPDATES:
            most = f"wanted at most {limits.COMPARED_UPDATES} over all configs and conventions"
            raise refuse(422, f"{cost} updates to evaluate, {most}", f"{where}.horizon")
        found.append((labels[index], own, others))
    schedules = [_compared(*one, asked.weight_decay, asked.points) for one in found]
    return pydantic_core.to_json({"schedules": schedules}, inf_nan_mode="null")


def _by_convention(config: dict[str, Any], setting: Setting, convention: str, where: str) -> Planned | str:
    """The same words as another framework reads them, or why it does not."""
    try:
        return planned({**config, "convention": convention}, setting, where)
    except Refusal as refusal:
        return "; ".join(problem.message for problem in refusal.problems)


def _compared(
    label: str, own: Planned, others: dict[str, Planned | str], weight_decay: float, points: int
) -> dict[str, Any]:
    schedule = own.schedule
    updates = drawn(schedule, points)
    return {
        "label": label,
        "hash": own.hash,
        "spec": schedule.spec,
        "total_updates": schedule.total_updates,
        "warmup_updates": schedule.warmup_updates,
        "summary": asdict(summarize(schedule, weight_decay)),
        "updates": updates.tolist(),
        "learning_rate": _rates(schedule, updates),
        "conventions": {
            name: {"error": other}
            if isinstance(other, str)
            else {
                "hash": other.hash,
                "summary": asdict(summarize(other.schedule, weight_decay)),
                "learning_rate": _rates(other.schedule, updates),
            }
            for name, other in others.items()
        },
    }


def drawn(schedule: Schedule, points: int) -> IntArray:
    """Updates at which a curve is drawn: evenly, for a logarithmic axis too, around its ends and the warm-up's end."""
    last = schedule.total_updates
    edges = [place + shift for place in (1, schedule.warmup_updates, last) for shift in (-2, -1, 0, 1, 2)]
    even = np.linspace(1, last, min(points, last)).round().astype(np.int64)
    rising = np.geomspace(1, last, min(points, last)).round().astype(np.int64)
    every = np.unique(np.concatenate([even, rising, np.array(edges, np.int64)]))
    return every[(every >= 1) & (every <= last)]


def _rates(schedule: Schedule, updates: IntArray) -> list[float]:
    rates = schedule.peak * schedule.multipliers(updates)
    if not np.all(np.isfinite(rates)):
        raise refuse(422, f"the schedule is not finite at update {updates[~np.isfinite(rates)][0]}", "config")
    return rates.tolist()  # type: ignore[no-any-return]


def _rate(schedule: Schedule, update: int) -> float:
    rate = schedule.lr(update)
    if not math.isfinite(rate):
        raise refuse(422, f"the schedule is not finite at update {update}", "config")
    return rate
