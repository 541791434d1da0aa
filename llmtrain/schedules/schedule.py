"""What is the learning rate of update k?

With warm-up W, horizon T and floor m: f(k) = k/W for k < W, else m + (1 - m) g((k - W) / (T - W)) with g(0) = 1 and
g(1) = 0; update W has exactly the peak, update T and all after it exactly m of it (where W = T, update T has the peak).
`plan` reads the config into a spec, a plain dictionary; a `Schedule` is the function that the spec describes, and
nothing else: equal specs give equal numbers, in any order of calls.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import ScheduleConfig, content_hash
from llmtrain.errors import ScheduleError, did_you_mean
from llmtrain.schedules.clock import Clock, ClockUnit, Scale, automatic_warmup
from llmtrain.schedules.conventions import Convention, convention_for
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.schedules.registry import Progress, Shape, load_module, read_parameters, shape_named
from llmtrain.schedules.warmups import check_warmup, rise

_LARGEST = 2**53  # beyond it a position is no longer exact in float64
_PARAMS = ("peak", "floor", "unit", "clock", "horizon", "warmup", "warmup_shape", "warmup_start", "convention", "shape")
_KEYS = (*ScheduleConfig.model_fields, "module", "warmup_shape", "warmup_start", "convention", "accumulation")


class Curve(Protocol):
    """Update numbers to multipliers of the peak; the value no longer changes from update `settled` on."""

    @property
    def settled(self) -> int: ...

    def __call__(self, ks: IntArray) -> FloatArray: ...


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every update, as `peak` times a multiplier. Make one with `plan` or `from_spec`."""

    canonical: str = field(repr=False)  # the spec as canonical JSON: equal text, equal function
    name: str
    peak: float
    floor: float
    total_updates: int  # the first update at or after the horizon
    warmup_updates: int  # the first update at or after the end of the warm-up
    curve: Curve = field(repr=False, compare=False)
    anneals: bool = field(repr=False, compare=False)  # its last value is one to compare runs at
    cyclic: bool = field(repr=False, compare=False)  # it may rise after the warm-up

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "Schedule":
        """The function that `spec` describes. Raises ScheduleError for any name, key or version it does not know."""
        from llmtrain.schedules.resume import joined_from_spec  # a join holds two schedules, so it needs this class

        if not isinstance(spec, dict) or set(spec) != {"name", "version", "params"}:
            raise ScheduleError(f"a schedule spec has the keys name, version and params, found {spec!r:.200}")
        try:
            return joined_from_spec(spec) if spec["name"] in ("extend", "replace") else _planned_from_spec(spec)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ScheduleError(f"schedule spec: {spec['name']} cannot be read: {error!r}") from error

    def __call__(self, k: int) -> float:
        """The multiplier of the peak used by update `k`, counted from 1."""
        return float(self.multipliers([min(k, self.curve.settled)])[0])

    def lr(self, k: int) -> float:
        """The learning rate of update `k`."""
        return self.peak * self(k)

    def multipliers(self, ks: Sequence[int] | NDArray[Any]) -> FloatArray:
        """The multipliers of many updates at once; each equals the one that a single call gives, bit for bit."""
        updates = np.asarray(ks)
        if updates.size and (updates.dtype.kind not in "iu" or updates.min() < 0):
            raise ScheduleError("updates are whole numbers from 0 on")
        return self.curve(np.minimum(updates, self.curve.settled).astype(np.int64).ravel()).reshape(updates.shape)

    def decayed(self, k: int) -> bool:
        """Whether the curve has come down to its final value by update `k`: its loss there is an annealed one."""
        value = self(k)
        arrived = k >= self.total_updates or (k >= self.warmup_updates and value == self(self.curve.settled))
        if k < 1 or not self.anneals or not arrived:
            return False
        before = self.multipliers(np.arange(k))
        return bool(before.max() > value and before[-1] >= value)

    @property
    def spec(self) -> dict[str, Any]:
        """{name, version, params} as plain JSON values: all there is to know about this function."""
        return json.loads(self.canonical)  # type: ignore[no-any-return]

    @property
    def hash(self) -> str:
        """The content hash of the spec."""
        return content_hash(self.spec)

    def with_batch(self, after_update: int, tokens_per_update: int) -> "Schedule":
        """The same curve over tokens when the global batch changes after update `after_update`."""
        spec = self.spec
        params = spec["params"]
        while "after" in params:  # a join: the part that is still to come
            params = params["after"]["params"]
        params["clock"] = Clock(params["unit"], _rows(params["clock"])).with_batch(after_update, tokens_per_update).spec
        return Schedule.from_spec(spec)

    def over(self, segments: list[list[int]]) -> "Schedule":
        """The same planned curve, in a run that consumed its tokens in these segments of a clock."""
        spec = self.spec
        if spec["params"]["unit"] == "tokens":
            spec["params"]["clock"] = segments
        return Schedule.from_spec(spec)


@dataclass(frozen=True)
class Planned:
    """Updates to multipliers: the clock, then the warm-up or the shape."""

    shape: Shape
    parameters: dict[str, Any]
    clock: Clock
    horizon: int
    warmup: int
    warmup_shape: str
    warmup_start: float
    floor: float
    convention: Convention

    @property
    def settled(self) -> int:
        return self.clock.update_at(self.horizon) + 3  # more than any convention lags behind

    def __call__(self, ks: IntArray) -> FloatArray:
        convention = self.convention
        position = self.clock.positions(ks)
        rising = position - convention.switch_lag < self.warmup
        values = np.empty_like(position)
        early = np.maximum(position[rising] - convention.warmup_lag, 0)
        values[rising] = rise(self.warmup_shape, self.warmup_start, early, self.warmup + convention.warmup_extra)
        span = self.horizon - self.warmup or self.clock.one_update()  # where W = T, the floor comes after T
        t = np.clip(position[~rising] - convention.decay_lag - self.warmup, 0, span)
        floor = 0.0 if convention.clips else self.floor
        values[~rising] = self.shape(Progress(t, span, self.warmup, floor), self.parameters)
        return np.maximum(values, self.floor * ~rising) if convention.clips else values


def plan(config: ScheduleConfig, tokens_per_update: int, beta2: float = 0.95) -> Schedule:
    """The schedule a config describes. `tokens_per_update` is the global batch; `beta2` is AdamW's, for warm-up `auto`.

    Raises ScheduleError for an unknown shape or parameter, or for lengths that do not fit together.
    """
    written = config.shape
    if "module" in written:
        load_module(str(written.pop("module")))
    shape = shape_named(config.name)
    unit: ClockUnit = "tokens" if config.horizon.unit == "tokens" else "steps"
    horizon = int(config.horizon.value)
    generic = {
        "warmup_shape": written.pop("warmup_shape", "linear"),
        "warmup_start": written.pop("warmup_start", 0.0),
        "convention": written.pop("convention", "llmtrain"),
    }
    if generic["convention"] == "litgpt":
        generic["accumulation"] = written.pop("accumulation", 1)
    check_warmup(generic["warmup_shape"], generic["warmup_start"], unit)
    clock = Clock.start(unit, tokens_per_update)
    scale = Scale(unit, horizon, 0, tokens_per_update)
    if config.warmup.unit == "auto":
        warmup = automatic_warmup(beta2, clock.update_at(horizon)) * scale.one_update
    else:
        warmup = scale.measure(config.warmup)
    if warmup > horizon:
        raise ScheduleError(f'schedule.warmup "{config.warmup}" is longer than schedule.horizon "{config.horizon}"')
    params = {
        **generic,
        "warmup_start": float(generic["warmup_start"]),
        "peak": float(config.peak),
        "floor": float(config.floor),
        "unit": unit,
        "clock": clock.spec,
        "horizon": horizon,
        "warmup": warmup,
        "shape": read_parameters(shape, written, replace(scale, warmup=warmup), also=_KEYS),
    }
    return Schedule.from_spec({"name": shape.name, "version": shape.version, "params": params})


def _planned_from_spec(spec: dict[str, Any]) -> Schedule:
    shape = shape_named(str(spec["name"]))
    params = spec["params"]
    if spec["version"] != shape.version:
        raise ScheduleError(
            f"schedule spec: {shape.name} version {spec['version']!r} is not known here, only {shape.version}; "
            "use the llmtrain that wrote it"
        )
    check_keys(params, (*_PARAMS, "accumulation") if params.get("convention") == "litgpt" else _PARAMS, shape.name)
    check_keys(params["shape"], tuple(shape.parameters), f"{shape.name}.shape")
    check_warmup(params["warmup_shape"], params["warmup_start"], params["unit"])
    horizon, warmup = params["horizon"], params["warmup"]
    if not 0 <= warmup <= horizon < _LARGEST or horizon < 1:
        raise ScheduleError(f"schedule spec: warm-up {warmup} and horizon {horizon} do not fit (0 to 2**53)")
    clock = Clock.from_spec(params["unit"], params["clock"])
    convention = convention_for(shape.name, params)
    start = params["floor"] if convention.warmup_from_floor else params["warmup_start"]
    curve = Planned(
        shape, params["shape"], clock, horizon, warmup, params["warmup_shape"], start, params["floor"], convention
    )
    total = clock.update_at(horizon)
    ends = curve(np.array([0, total, curve.settled]))
    if ends.shape != (3,) or not np.all(np.isfinite(ends)) or ends.min() < 0:
        raise ScheduleError(f"schedule {shape.name} gives {ends.tolist()} at its ends, wanted numbers from 0 on")
    return Schedule(
        canonical=canonical_json(spec),
        name=shape.name,
        peak=params["peak"],
        floor=params["floor"],
        total_updates=total,
        warmup_updates=clock.update_at(warmup),
        curve=curve,
        anneals=shape.ends != "open" or bool(ends[2] == params["floor"]),
        cyclic=shape.cyclic,
    )


def canonical_json(spec: dict[str, Any]) -> str:
    """One text for equal specs."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)


def check_keys(found: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise ScheduleError unless `found` has exactly the keys `known`."""
    for key in found:
        if key not in known:
            raise ScheduleError(f'schedule spec: {where} has no key "{key}"{did_you_mean(key, known)}')
    missing = [key for key in known if key not in found]
    if missing:
        raise ScheduleError(f"schedule spec: {where} lacks {', '.join(missing)}")


def _rows(segments: list[list[int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((a, b, c) for a, b, c in segments)
