"""Which shapes are there, and what may be written beside `schedule.name`?

A shape is a function of a `Progress` and of keyword-only parameters. Their names, types and defaults are read from its
signature, so there is one place to change. It returns g, falling from 1 to 0, which is then laid between peak and
floor; a shape registered with `absolute=True` returns the multiplier of the peak itself.

    @register_schedule("square")
    def square(at: Progress, *, power: float = 2.0) -> FloatArray:
        return 1 - at.x**power

`schedule.module: my_schedules.py` in a config runs such a file before the name is looked up.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from llmtrain.errors import ScheduleError, did_you_mean
from llmtrain.schedules.clock import Scale
from llmtrain.schedules.exact import FloatArray

Ends = Literal["floor", "level", "open"]
Function = TypeVar("Function", bound=Callable[..., FloatArray])


@dataclass(frozen=True)
class Progress:
    """Where the shape is asked: after the warm-up, `t` of `span` units of the clock (updates, or tokens)."""

    t: FloatArray  # 0 at the end of the warm-up, at most span
    span: int
    warmup: int
    floor: float

    @property
    def x(self) -> FloatArray:
        """Progress through the shape, 0 to 1."""
        return self.t / self.span


def read_length(where: str, written: object, scale: Scale) -> int:
    """A length as the user writes it becomes units of the clock."""
    return scale.read(where, written)


def read_lengths(where: str, written: object, scale: Scale) -> list[int]:
    """A list of lengths becomes units of the clock."""
    if not isinstance(written, list | tuple):
        raise ScheduleError(f'{where} is {written!r}, wanted a list of lengths such as ["80%", "90%"]')
    return [scale.read(f"{where}[{i}]", item) for i, item in enumerate(written)]


Units = Annotated[Any, read_length]  # written "20%" or "500 steps"; the shape receives whole units of the clock
UnitsList = Annotated[Any, read_lengths]


@dataclass(frozen=True)
class Parameter:
    """One keyword of a shape: its type and its default (`inspect.Parameter.empty` where it must be written)."""

    name: str
    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def type_name(self) -> str:
        """How the type is called in a listing."""
        if get_origin(self.hint) is Literal:
            return " | ".join(map(str, get_args(self.hint)))
        if get_origin(self.hint) is Annotated:
            return get_args(self.hint)[1].__name__.removeprefix("read_")  # type: ignore[no-any-return]
        return str(self.hint) if get_origin(self.hint) else str(self.hint.__name__)

    def read(self, where: str, written: object, scale: Scale) -> Any:
        """The JSON value that goes into the spec, from what the user wrote."""
        if get_origin(self.hint) is Annotated:
            return get_args(self.hint)[1](where, written, scale)
        return read_plain(where, written, self.hint)


@dataclass(frozen=True)
class Shape:
    """A registered shape.

    `ends` says what its last value means: `floor` (exactly the floor), `level` (a last level of its own), `open` (still
    unannealed, as a constant is). `cyclic` shapes may rise after the warm-up.
    """

    name: str
    version: int
    function: Callable[..., FloatArray]
    parameters: dict[str, Parameter]
    absolute: bool
    cyclic: bool
    ends: Ends

    def __call__(self, at: Progress, parameters: dict[str, Any]) -> FloatArray:
        """Multipliers of the peak."""
        value = self.function(at, **parameters)
        return value if self.absolute else at.floor + (1 - at.floor) * value

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""


_SHAPES: dict[str, Shape] = {}


def register_schedule(
    name: str, *, version: int = 1, absolute: bool = False, cyclic: bool = False, ends: Ends = "floor"
) -> Callable[[Function], Function]:
    """Make the decorated function the shape `name`. Raise `version` when its values for given parameters change."""

    def register(function: Function) -> Function:
        known = _SHAPES.get(name)
        if known is not None and inspect.getsourcefile(known.function) != inspect.getsourcefile(function):
            raise ScheduleError(f'schedule "{name}" exists already, in {inspect.getsourcefile(known.function)}')
        parameters = _parameters(name, function)
        _SHAPES[name] = Shape(name, version, function, parameters, absolute, cyclic, ends)
        return function

    return register


def shape_named(name: str) -> Shape:
    """The shape registered as `name`. Raises ScheduleError with the nearest known name."""
    if name not in _SHAPES:
        raise ScheduleError(
            f'unknown schedule "{name}"{did_you_mean(name, _SHAPES)} (one of your own needs schedule.module: its file)'
        )
    return _SHAPES[name]


def catalog() -> list[Shape]:
    """Every registered shape, by name."""
    return [_SHAPES[name] for name in sorted(_SHAPES)]


def read_parameters(
    shape: Shape, written: dict[str, Any], scale: Scale, where: str = "schedule", also: Iterable[str] = ()
) -> dict[str, Any]:
    """All parameters of `shape` in the form the spec keeps, defaults filled in. `also`: other keys known there."""
    for key in written:
        if key not in shape.parameters:
            hint = did_you_mean(key, [*shape.parameters, *also])
            raise ScheduleError(f'{where}: {shape.name} has no parameter "{key}"{hint}')
    values = {}
    for name, parameter in shape.parameters.items():
        if name not in written and parameter.required:
            raise ScheduleError(f'{where}: {shape.name} needs "{name}" ({parameter.type_name})')
        values[name] = parameter.read(f"{where}.{name}", written.get(name, parameter.default), scale)
    return values


def read_plain(where: str, written: object, hint: Any) -> Any:
    """A number, a choice or a list of them, checked against its type; nothing is repaired but int to float."""
    if get_origin(hint) is Literal:
        if written not in get_args(hint):
            raise ScheduleError(f"{where} is {written!r}{did_you_mean(str(written), map(str, get_args(hint)))}")
        return written
    if get_origin(hint) is list:
        if not isinstance(written, list | tuple):
            raise ScheduleError(f"{where} is {written!r}, wanted a list")
        return [read_plain(f"{where}[{i}]", item, get_args(hint)[0]) for i, item in enumerate(written)]
    number = isinstance(written, int | float) and not isinstance(written, bool)
    if hint is float and number and math.isfinite(written):  # type: ignore[arg-type]
        return float(written)  # type: ignore[arg-type]
    if hint is not float and type(written) is hint:
        return written
    raise ScheduleError(f"{where} is {written!r}, wanted {hint.__name__}")


def load_module(path: str) -> None:
    """Run the user's file at `path`, which registers shapes. Doing so again runs it again."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ScheduleError(f"schedule.module: there is no file {file}")
    name = f"llmtrain_user_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise ScheduleError(f"schedule.module: {file} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except ScheduleError as error:
        raise ScheduleError(f"schedule.module {file}: {error}") from None
    except Exception as error:
        raise ScheduleError(f"schedule.module {file}: {type(error).__name__}: {error}") from error


def _parameters(name: str, function: Callable[..., FloatArray]) -> dict[str, Parameter]:
    """The keyword-only parameters of `function`. Raises ScheduleError where the signature cannot be used."""
    signature = list(inspect.signature(function).parameters.values())
    if not signature:
        raise ScheduleError(f'schedule "{name}" must take the Progress as its first argument')
    hints = get_type_hints(function, include_extras=True)
    parameters = {}
    for parameter in signature[1:]:
        hint = hints.get(parameter.name)
        usable = get_origin(hint) in (Annotated, Literal, list) or hint in (float, int, bool, str)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or not usable:
            raise ScheduleError(
                f'schedule "{name}": parameter "{parameter.name}" must be keyword-only (after *) '
                "and typed float, int, bool, str, Literal, list or Units"
            )
        parameters[parameter.name] = Parameter(parameter.name, hint, parameter.default)
    return parameters
