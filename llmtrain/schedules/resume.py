"""May this run go on with that schedule, and which learning rates does it get if it may?

A checkpoint holds the spec of the schedule it was trained on. Where the config still asks for it, the run goes on with
it (`continues`). Else it is refused with every changed field (`refusal`), unless the user names how to go on:

- `extend`: the new curve, laid so that it starts from the learning rate of the last update and ends where the new curve
  ends, at its floor and horizon.
- `replace`: the new curve, whole, from the next update on. No field of the old one survives.

Either way the result is one `Schedule` again, whose spec holds both sides and the update they meet at.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmtrain.errors import ScheduleError
from llmtrain.schedules.clock import Clock
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.schedules.schedule import Schedule, canonical_json, check_keys

_VERSION = 1


class Change(NamedTuple):
    """One field that differs; None where that side has no such field."""

    field: str
    old: Any
    new: Any


def diff(old_spec: dict[str, Any], new_spec: dict[str, Any]) -> list[Change]:
    """Every field in which two specs differ, by its dotted name."""
    old, new = _flat(old_spec), _flat(new_spec)
    return [Change(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def latest(schedule: Schedule) -> Schedule:
    """The schedule of the updates still to come, as it was planned: the last part of a joined one."""
    spec = schedule.spec
    while spec["name"] in ("extend", "replace"):
        spec = spec["params"]["after"]
    return Schedule.from_spec(spec)


def continues(saved: Schedule, configured: Schedule) -> bool:
    """Whether a config still asks for what a checkpoint was trained on; then go on with `saved`, joins and all."""
    return not _changes(saved, configured)


def refusal(saved: Schedule, configured: Schedule, at: int) -> str:
    """Why a run saved after update `at` does not go on: both sides in columns, the LR at the join, and the ways on."""
    return (
        "the config asks for another schedule than the checkpoint was trained on:\n"
        f"{both_sides(saved, configured)}\n"
        f"  LR of update {at} was {saved.lr(at):.6g}; update {at + 1} would get {saved.lr(at + 1):.6g} by the "
        f"checkpoint's schedule, {replace(saved, at, configured).lr(at + 1):.6g} by the config's\n"
        "restore the config, or go on with extend (continuous to the new horizon), replace (the new curve from here "
        "on) or branch (a new run)"
    )


def both_sides(saved: Schedule, configured: Schedule) -> str:
    """Every changed field, what the checkpoint says of it and what the config says, in columns."""
    changes = _changes(saved, configured)
    rows = [("", "checkpoint", "config"), *((_key(row.field), _text(row.old), _text(row.new)) for row in changes)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {field:<{widths[0]}}  {old:<{widths[1]}}  {new}".rstrip() for field, old, new in rows)


def replace(old: Schedule, at: int, new: Schedule) -> Schedule:
    """`old` through update `at`, `new` after it. Tokens go on counting from `old`, also with another global batch."""
    return _joined("replace", old, at, new)


def extend(old: Schedule, at: int, new: Schedule) -> Schedule:
    """`old` through update `at`, then `new` laid from the learning rate reached to the end of `new`.

    Where N is the new curve, e its value at its end and r the rate reached, update k gets e + (r - e) (N(k) - e) /
    (N(at) - e); where N(at) = e it gets a straight line. Within a warm-up of `new` its peak takes the place of its end.
    If r = N(at), as in extending a WSD run before its cooldown, this is N itself.
    """
    return _joined("extend", old, at, new)


@dataclass(frozen=True)
class Joined:
    """Updates to multipliers of `after.peak`: one schedule through update `at`, another after it."""

    before: Schedule
    at: int
    after: Schedule
    extends: bool

    @property
    def settled(self) -> int:
        return max(self.at + 1, self.after.curve.settled)

    def __call__(self, ks: IntArray) -> FloatArray:
        values = np.empty(ks.shape)
        early = ks <= self.at
        values[early] = self._past(ks[early])
        values[~early] = self._laid(ks[~early]) if self.extends else self.after.multipliers(ks[~early])
        return values

    def reached(self) -> float:
        """The multiplier of update `at`."""
        return float(self._past(np.array([self.at]))[0])

    def _past(self, ks: IntArray) -> FloatArray:
        values = self.before.multipliers(ks)
        return values if self.before.peak == self.after.peak else self.before.peak * values / self.after.peak

    def _laid(self, ks: IntArray) -> FloatArray:
        new, here, reached = self.after.multipliers(ks), self.after(self.at), self.reached()
        if here == reached:
            return new
        rising = self.at < self.after.warmup_updates
        last = self.after.warmup_updates if rising else self.after.total_updates
        end = self.after(last)
        if here == end:
            laid = end + (reached - end) * ((last - ks) / (last - self.at))
        else:
            laid = end + (reached - end) * ((new - end) / (here - end))
        return np.where(ks < last, laid, new)


def joined_from_spec(spec: dict[str, Any]) -> Schedule:
    """The schedule that `_joined` wrote down."""
    name, params = spec["name"], spec["params"]
    if spec["version"] != _VERSION:
        raise ScheduleError(f"schedule spec: {name} version {spec['version']!r} is not known here, only {_VERSION}")
    check_keys(params, ("before", "at", "after"), name)
    before, after, at = Schedule.from_spec(params["before"]), Schedule.from_spec(params["after"]), params["at"]
    if type(at) is not int or at < 0:
        raise ScheduleError(f"schedule spec: {name}.at is {at!r}, wanted an update number")
    curve = Joined(before, at, after, extends=name == "extend")
    if curve.extends:
        _check_extension(curve)
    return Schedule(
        canonical=canonical_json(spec),
        name=after.name,
        peak=after.peak,
        floor=after.floor,
        total_updates=after.total_updates,
        warmup_updates=after.warmup_updates,
        curve=curve,
        anneals=after.anneals,
        cyclic=after.cyclic,
    )


def _joined(name: str, old: Schedule, at: int, new: Schedule) -> Schedule:
    if type(at) is not int or at < 0:
        raise ScheduleError(f"schedules meet after an update from 0 on, found {at!r}")
    new = _counting_on(old, at, new)
    params = {"before": old.spec, "at": at, "after": new.spec}
    return old if old == new else Schedule.from_spec({"name": name, "version": _VERSION, "params": params})


def _counting_on(old: Schedule, at: int, new: Schedule) -> Schedule:
    """`new` with the token count of `old` through update `at`, and its own batch from there on."""
    before, spec = latest(old).spec["params"], new.spec
    after = spec["params"]
    if "clock" not in after or before["unit"] != "tokens" or after["unit"] != "tokens":
        return new
    clock = Clock.from_spec("tokens", before["clock"])
    after["clock"] = clock.with_batch(at, after["clock"][-1][2]).spec
    return Schedule.from_spec(spec)


def _check_extension(join: Joined) -> None:
    at, new, reached = join.at, join.after, join.reached()
    if at >= new.total_updates:
        raise ScheduleError(
            f"extend: the run is at update {at} and the new horizon ends at {new.total_updates}: write a longer one, "
            "or use replace"
        )
    if new.cyclic and new(at) != reached:
        raise ScheduleError(
            f"extend: {new.name} rises again, so it cannot be laid from {reached:g} of the peak, the multiplier of "
            f"update {at}, instead of its own {new(at):g}; use replace"
        )
    if at > 0 and reached == 0 and new(new.total_updates) == 0 and at >= new.warmup_updates:
        raise ScheduleError(
            f"extend: the learning rate is 0 after update {at} and would stay there; use replace with a schedule that "
            "warms up again"
        )


def _changes(saved: Schedule, configured: Schedule) -> list[Change]:
    """Differences between what is still to come and the config; of the clock only its present batch counts."""
    sides = [latest(saved).spec, latest(configured).spec]
    for spec in sides:
        clock = spec["params"].pop("clock")
        spec["params"]["tokens_per_update"] = clock[-1][2] if clock else None
    return diff(*sides)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key in value for name, leaf in _flat(value[key], f"{path}.{key}" if path else key).items()}


def _key(field: str) -> str:
    """What a field of the spec is called in a config."""
    return "schedule." + field.removeprefix("params.").removeprefix("shape.")


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else f"{value!s:.60}"
