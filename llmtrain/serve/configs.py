"""Which schedule does a config over HTTP describe, and may it be read at all?

A config takes the words of the `schedule` section in a YAML file. Whatever would read a file or run code (`module`, a
file name for `knots` or `norms`) is refused before the library sees it, and so is what costs more than its bytes.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from llmtrain.config import ScheduleConfig
from llmtrain.config_file import read_section
from llmtrain.errors import ConfigError, LlmtrainError
from llmtrain.schedules import Schedule, plan
from llmtrain.schedules.given import read_knots, read_norms, read_pieces
from llmtrain.schedules.registry import Shape, catalog, read_length, read_lengths
from llmtrain.serve import limits
from llmtrain.serve.asked import Setting
from llmtrain.serve.refusals import Problem, Refusal, refuse, shortened
from llmtrain.units import parse_batch_tokens

LENGTH_PATTERN = (
    r"^ *(auto|[+-]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9_]+)([eE][+-]?[0-9]{1,2})? *[KMBT]? *(steps?|tokens?|%)) *$"
)
GENERIC = ("warmup_shape", "warmup_start", "convention", "accumulation")
_canonical = json.JSONEncoder(sort_keys=True).encode
_LENGTH = re.compile(LENGTH_PATTERN)
_MOST_PROBLEMS = 20


class Planned(NamedTuple):
    """A schedule and its hash."""

    schedule: Schedule
    hash: str


def planned(config: object, setting: Setting, where: str = "config") -> Planned:
    """The schedule of a config. Raises Refusal (422) with every problem."""
    key = _canonical([config, setting.tokens_per_update, setting.beta2])
    if len(key) <= limits.SMALL_BYTES:
        return _remembered(key, where)
    return _plan(config, setting.tokens_per_update, setting.beta2, where)


@lru_cache(maxsize=limits.CACHED_SCHEDULES)
def _remembered(key: str, where: str) -> Planned:
    config, tokens_per_update, beta2 = json.loads(key)
    return _plan(config, tokens_per_update, beta2, where)


def _plan(config: Any, tokens_per_update: int | str | None, beta2: float, where: str) -> Planned:
    if not isinstance(config, dict):
        raise refuse(422, "wanted an object such as the schedule section of a run", where)
    dangers = list(_dangers(config, where))
    if dangers:
        raise Refusal(422, dangers[:_MOST_PROBLEMS])
    tokens = _tokens(tokens_per_update, config)
    try:
        schedule = plan(read_section(ScheduleConfig, config, where), tokens, beta2)
    except LlmtrainError as error:
        raise Refusal(422, _complaints(error, config, where)) from None
    return Planned(schedule, schedule.hash)


def _tokens(written: int | str | None, config: dict[str, Any]) -> int:
    """The global batch. Without a length in tokens it plays no part and need not be written."""
    if written is None:
        if "token" in json.dumps(config):
            raise refuse(422, "a length in tokens needs the global batch: 524288, 512K or 4M", "tokens_per_update")
        return 1
    try:
        tokens = parse_batch_tokens(written)
    except ValueError as error:
        raise refuse(422, str(error), "tokens_per_update") from None
    if tokens > limits.LARGEST:
        raise refuse(422, f"{tokens} tokens, wanted at most {limits.LARGEST}", "tokens_per_update")
    return tokens


def _dangers(config: dict[str, Any], where: str) -> Iterator[Problem]:
    """What the library must not see: values out of bounds, and whatever would read a file or run code."""
    oversized = next(_oversized(config, where, 1), None)
    if oversized is not None:
        yield oversized
        return
    for key in ("warmup", "horizon"):
        yield from _of_length(config.get(key), f"{where}.{key}")
    yield from _of_shape(config, where)


def _oversized(value: Any, where: str, depth: int) -> Iterator[Problem]:
    if isinstance(value, str):
        if len(value) > limits.TEXT_CHARACTERS or not (value.isascii() and value.isprintable()):
            yield Problem(field=where, message=f"wanted at most {limits.TEXT_CHARACTERS} printable ASCII characters")
    elif isinstance(value, int | float):
        if not -limits.LARGEST <= value <= limits.LARGEST:
            yield Problem(field=where, message="wanted a number from -2**53 to 2**53")
    elif isinstance(value, list | dict):
        if depth > limits.JSON_DEPTH:
            yield Problem(field=shortened(where), message=f"nested more than {limits.JSON_DEPTH} deep")
        elif len(value) > limits.LIST_ITEMS:
            yield Problem(field=where, message=f"{len(value)} items, wanted at most {limits.LIST_ITEMS}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from _oversized(item, f"{where}[{index}]", depth + 1)
        else:
            for key, item in value.items():
                yield from _oversized(key, where, depth + 1)
                yield from _oversized(item, f"{where}.{key}", depth + 1)


def _of_shape(written: dict[str, Any], where: str) -> Iterator[Problem]:
    """Dangers among the parameters of one shape, be it the config's or a piece of a chain."""
    if "module" in written:
        yield Problem(field=f"{where}.module", message="a schedule of your own cannot be loaded over HTTP")
    shape = _shape(written)
    for name, parameter in shape.parameters.items() if shape is not None else ():
        if name in written:
            yield from _of_parameter(written[name], parameter.hint, f"{where}.{name}")


def _of_parameter(value: Any, hint: Any, where: str) -> Iterator[Problem]:
    """Known readers are checked, unknown ones refused: a new one may read what it likes."""
    reader = get_args(hint)[1] if get_origin(hint) is Annotated else None
    if reader is None:
        if hint is int and isinstance(value, int) and value > limits.COUNT:
            yield Problem(field=where, message=f"{value}, wanted at most {limits.COUNT}")
    elif reader is read_length:
        yield from _of_length(value, where)
    elif reader in (read_lengths, read_knots, read_norms, read_pieces):
        if not isinstance(value, list):
            yield Problem(field=where, message="wanted a list; a file cannot be read over HTTP")
        elif reader is read_lengths:
            for index, item in enumerate(value):
                yield from _of_length(item, f"{where}[{index}]")
        elif reader is read_knots:
            for index, knot in enumerate(value):
                yield from _of_length(knot[0] if isinstance(knot, list) and knot else None, f"{where}[{index}]")
        elif reader is read_pieces:
            yield from _of_pieces(value, where)
    else:
        yield Problem(field=where, message="this parameter cannot be written over HTTP")


def _of_pieces(pieces: list[Any], where: str) -> Iterator[Problem]:
    if len(pieces) > limits.PIECES:
        yield Problem(field=where, message=f"{len(pieces)} pieces, wanted at most {limits.PIECES}")
        return
    for index, piece in enumerate(pieces):
        if isinstance(piece, dict):
            yield from _of_length(piece.get("length"), f"{where}[{index}].length")
            yield from _of_shape(piece, f"{where}[{index}]")


def _of_length(value: Any, where: str) -> Iterator[Problem]:
    """A text of another form is none that a length has, and the OpenAPI document says so."""
    if isinstance(value, str) and not _LENGTH.match(value):
        wanted = 'write "2000 steps", "8B tokens", "1%" or "auto"'
        yield Problem(field=where, message=f"{value!r} is not a length: {wanted}")


def _complaints(error: LlmtrainError, config: dict[str, Any], where: str) -> list[Problem]:
    """The library's complaints. A ConfigError has one a line, under a line that names the section."""
    lines = str(error).splitlines()
    if isinstance(error, ConfigError) and len(lines) > 1:
        messages = [line.strip() for line in lines[1:]]
    else:
        messages = [" ".join(lines)]
    return [Problem(field=_field(text, config, where), message=shortened(text)) for text in messages[:_MOST_PROBLEMS]]


def _field(message: str, config: dict[str, Any], where: str) -> str:
    """The key that a complaint begins with, or the config as a whole."""
    if message.startswith('unknown schedule "'):
        return f"{where}.name"
    extra = re.search(r'has no parameter "(\w+)"', message)
    match = extra or re.match(r"(?:unknown )?(?:schedule\.)?\"?(\w+)", message)
    shape = _shape(config)
    known = {*ScheduleConfig.model_fields, *GENERIC, *(shape.parameters if shape else ()), *config}
    return f"{where}.{match[1]}" if match and match[1] in known else where


def _shape(written: dict[str, Any]) -> Shape | None:
    return _shapes().get(str(written.get("name")))


@lru_cache(maxsize=1)
def _shapes() -> dict[str, Shape]:
    return {shape.name: shape for shape in catalog()}
