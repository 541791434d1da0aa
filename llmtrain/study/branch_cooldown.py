"""With which schedule does a branch go on: `cooldown(SHAPE, LENGTH)`, or any other?

A cooldown goes from the learning rate that the trunk has reached down to the floor. `20%` is the share of the branch's
whole length, trunk included, so T = k / (1 - 0.2), rounded up; `500 steps` are 500 further updates. Where the trunk is
at its peak this is `wsd` with the trunk's warm-up, peak and floor: the schedule of the run that one would have trained
from the start. Below the peak it is `infinite`, whose level is the rate reached. Shapes that WSD does not have are
pieces of a `chain`.

Positions count what the trunk's horizon counts, updates or tokens. `before` is the schedule of the trunk.
"""

import math
import re
from fractions import Fraction
from typing import Any, NamedTuple, get_args

import numpy as np

from llmtrain.config import Config
from llmtrain.config_file import apply_override
from llmtrain.errors import ScheduleError, did_you_mean
from llmtrain.schedules import Schedule, catalog, latest
from llmtrain.schedules.clock import Clock, Scale
from llmtrain.schedules.conventions import CONVENTIONS
from llmtrain.schedules.phases import Cooldown
from llmtrain.schedules.registry import shape_named
from llmtrain.study.schedule_shown import section_of
from llmtrain.units import Length

COOLDOWNS: tuple[str, ...] = get_args(Cooldown)
_WRITTEN = re.compile(r"cooldown\((?P<shape>.+),(?P<length>[^,]+)\)")
_HOW = 'write cooldown(SHAPE, 20%) or cooldown(SHAPE, 500 steps), for example "cooldown(1-sqrt, 20%)"'
_USUAL = {"warmup_shape": "linear", "warmup_start": 0.0}


class Parent(NamedTuple):
    """The trunk after one update."""

    run: str  # the folder, as the user names it
    step: int
    config: Config
    before: Schedule
    batch: int  # sequences of that update
    trajectory: dict[str, Any] | None  # what shaped its loss; None where it is not trained so far
    ranks: int


def section(parent: Parent, written: str) -> dict[str, Any]:
    """The `schedule` section that `cooldown(SHAPE, LENGTH)` or `name:param=value` stands for. Raises LlmtrainError."""
    found = _WRITTEN.fullmatch(written.strip())
    if found is None and written.strip().startswith("cooldown"):
        raise ScheduleError(f'--schedule "{written}": {_HOW}')
    if found is None:
        return section_of(written.strip(), parent.config)
    length = cooldown_length(found["length"])
    start = position(parent.before, parent.step)
    if length.unit == "percent":
        end = math.ceil(start / (1 - Fraction(str(length.value)) / 100))
    else:
        end = start + scale(parent.before, parent.config, start).measure(length)
    return cooldown(parent, found["shape"].strip(), start, end)


def cooldown_length(written: str) -> Length:
    """A length that a cooldown can have. Raises ScheduleError."""
    try:
        length = Length.parse(written)
    except ValueError as error:
        raise ScheduleError(f"cooldown: {error}") from None
    if length.unit == "auto" or length.value == 0 or (length.unit == "percent" and length.value == 100):
        raise ScheduleError(f'cooldown: its length is "{length}", wanted some updates of the run: {_HOW}')
    return length


def cooldown(parent: Parent, shape: str, start: int, end: int) -> dict[str, Any]:
    """The `schedule` section that goes from the learning rate reached, at position `start`, to the floor at `end`.

    `shape` is one of WSD's cooldowns, or a registered shape that falls to its floor (`polynomial:power=3`). Raises
    ScheduleError for others, and where the trunk is still warming up or at 0.
    """
    before, at = parent.before, parent.step
    params = latest(before).spec["params"]
    unit = params["unit"]
    if at < before.warmup_updates:
        raise ScheduleError(
            f"update {at} of {parent.run} is inside its warm-up of {before.warmup_updates} updates: a cooldown starts "
            "there or later"
        )
    level, peak, floor = before(at), before.peak, before.floor
    if level == 0:
        raise ScheduleError(f"the learning rate of {parent.run} is 0 after update {at}: there is nothing to cool down")
    if level > 1:  # an extension that was laid from a higher peak
        level, peak, floor = 1.0, before.lr(at), floor * before.peak / before.lr(at)
    falling = f"{end - start} {unit}"
    warmup, rise = params["warmup"], {key: params[key] for key, usual in _USUAL.items() if params[key] != usual}
    name, *own = shape.split(":")
    curve: dict[str, Any]
    if name in COOLDOWNS and not own and level == 1:
        curve = {"name": "wsd", "decay": falling, "cooldown": name, **_convention(params)}
    else:
        warmup = min(warmup, start - scale(before, parent.config, end).one_update)
        held = f"{start - warmup} {unit}"
        if name in COOLDOWNS and not own:
            curve = {"name": "infinite", "cooldown": held, "level": level, "anneal": falling, "anneal_shape": name}
        else:
            g = 1.0 if level == 1 else (level - floor) / (1 - floor)
            curve = {"name": "chain", "pieces": [{"name": "constant", "length": held, "start": g}, _falling(name, own)]}
    module = {key: text for key, text in parent.config.schedule.shape.items() if key == "module"}
    lengths = {"warmup": f"{warmup} {unit}", "horizon": f"{end} {unit}"}
    return {**curve, "peak": peak, **lengths, "floor": floor, **rise, **module}


def position(before: Schedule, step: int) -> int:
    """Where the clock of a schedule stands after update `step`: updates, or tokens consumed."""
    return int(clock(before).positions(np.array([step]))[0])


def clock(before: Schedule) -> Clock:
    """What the schedule counts in the updates still to come."""
    params = latest(before).spec["params"]
    return Clock.from_spec(params["unit"], params["clock"])


def scale(before: Schedule, config: Config, end: int) -> Scale:
    """What lengths are measured against in a run that ends at position `end`."""
    return Scale(clock(before).unit, end, 0, config.batch.tokens)


def _convention(params: dict[str, Any]) -> dict[str, str]:
    """How the trunk counts updates, where that is another framework's way and that framework has WSD."""
    shapes = CONVENTIONS[params["convention"]].shapes
    return {"convention": params["convention"]} if shapes is not None and "wsd" in shapes else {}


def _falling(name: str, own: list[str]) -> dict[str, Any]:
    """A piece of a chain that falls to the floor."""
    known = [shape.name for shape in catalog() if shape.ends == "floor" and not shape.absolute and not shape.cyclic]
    if name not in known:
        also = f"a cooldown of shape {name} takes no parameters" if name in COOLDOWNS else f'unknown shape "{name}"'
        raise ScheduleError(f"cooldown: {also}{did_you_mean(name, [*COOLDOWNS, *known])}")
    piece: dict[str, Any] = {"name": shape_named(name).name}
    for text in own:
        apply_override(piece, text)
    return piece
