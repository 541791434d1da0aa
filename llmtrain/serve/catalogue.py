"""How is a config written, as JSON Schema? One schema for every registered shape, made from its signature."""

import inspect
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args, get_origin

from llmtrain.schedules.conventions import CONVENTIONS
from llmtrain.schedules.given import read_knots, read_norms, read_pieces
from llmtrain.schedules.registry import Parameter, Shape, catalog, read_length, read_lengths
from llmtrain.schedules.warmups import WARMUPS
from llmtrain.serve import limits
from llmtrain.serve.configs import LENGTH_PATTERN
from llmtrain.serve.refusals import refuse

Schema = dict[str, Any]

LENGTH: Schema = {
    "anyOf": [{"type": "string", "pattern": LENGTH_PATTERN, "maxLength": limits.TEXT_CHARACTERS}, {"const": 0}]
}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_NUMBER: Schema = {"type": "number", "minimum": -limits.LARGEST, "maximum": limits.LARGEST}
_READERS: dict[Any, Schema] = {
    read_length: LENGTH,
    read_lengths: {"type": "array", "items": LENGTH, "maxItems": limits.LIST_ITEMS},
    read_knots: {
        "type": "array",
        "minItems": 1,
        "maxItems": limits.LIST_ITEMS,
        "items": {"type": "array", "prefixItems": [LENGTH, _SHARE], "items": False, "minItems": 2},
    },
    read_norms: {
        "type": "array",
        "minItems": 2,
        "maxItems": limits.LIST_ITEMS,
        "items": {"type": "number", "exclusiveMinimum": 0, "maximum": limits.LARGEST},
    },
    read_pieces: {
        "type": "array",
        "minItems": 1,
        "maxItems": limits.PIECES,
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}, "length": LENGTH, "start": _SHARE, "end": _SHARE},
            "additionalProperties": True,
        },
    },
}
_PLAIN: dict[Any, Schema] = {
    float: _NUMBER,
    int: {"type": "integer", "minimum": -limits.LARGEST, "maximum": limits.COUNT},
    bool: {"type": "boolean"},
    str: {"type": "string", "maxLength": limits.TEXT_CHARACTERS},
}
_COMMON: dict[str, Schema] = {
    "peak": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": limits.LARGEST,
        "description": "the largest learning rate",
    },
    "warmup": {**LENGTH, "default": "0 steps", "description": "2000 steps, 1%, auto"},
    "horizon": {**LENGTH, "description": "where the curve ends: 50000 steps, 8B tokens"},
    "floor": {**_SHARE, "default": 0.0, "description": "the final multiplier of the peak"},
    "warmup_shape": {"enum": list(WARMUPS), "default": "linear"},
    "warmup_start": {**_SHARE, "default": 0.0, "description": "the multiplier that the warm-up starts from"},
    "convention": {
        "enum": sorted(CONVENTIONS),
        "default": "llmtrain",
        "description": "count updates as that framework",
    },
    "accumulation": {
        "type": "integer",
        "minimum": 1,
        "maximum": limits.LARGEST,
        "default": 1,
        "description": "micro-batches of an update; only with convention litgpt",
    },
}
_EXAMPLE: dict[str, Any] = {"peak": 3e-4, "warmup": "2000 steps", "horizon": "50000 steps", "floor": 0.1}
_NEEDED: dict[str, dict[str, Any]] = {
    "piecewise": {"warmup": "0 steps", "knots": [["0%", 0.0], ["4%", 1.0], ["60%", 0.4], ["100%", 0.1]]},
    "refined": {"warmup": "0 steps", "norms": [4.0, 2.0, 1.2, 1.0, 0.9, 0.8]},
    "chain": {"pieces": [{"name": "constant", "length": "60%"}, {"name": "linear", "end": 0.1}]},
    "one_cycle": {"warmup": "0 steps"},
}


def all_schedules() -> dict[str, Any]:
    """GET /schedules."""
    return {"schedules": [_entry(shape) for shape in catalog()], "common": _COMMON}


def one_schedule(name: str) -> dict[str, Any]:
    """GET /schedules/{name}."""
    shape = next((shape for shape in catalog() if shape.name == name), None)
    if shape is None:
        raise refuse(404, f"there is no schedule {name!r:.110}; GET /schedules lists them", "name")
    return _entry(shape)


@lru_cache(maxsize=1)
def config_schema() -> Schema:
    """Any config: one alternative for each shape."""
    return {
        "title": "ScheduleConfig",
        "anyOf": [shape_schema(shape) for shape in catalog()],
        "examples": [example("cosine")],
    }


def shape_schema(shape: Shape) -> Schema:
    """A config of this shape. What fits may still be refused, as a warm-up longer than its horizon is."""
    own = {name: _parameter_schema(parameter) for name, parameter in shape.parameters.items()}
    return {
        "title": shape.name,
        "description": shape.doc,
        "type": "object",
        "required": ["name", "peak", "horizon", *(name for name, p in shape.parameters.items() if p.required)],
        "properties": {"name": {"const": shape.name}, **_COMMON, **own},
        "additionalProperties": False,
    }


def example(name: str) -> dict[str, Any]:
    """A config of this shape that can be planned as it stands."""
    return {"name": name, **_EXAMPLE, **_NEEDED.get(name, {})}


def _entry(shape: Shape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "version": shape.version,
        "doc": shape.doc,
        "ends": shape.ends,
        "cyclic": shape.cyclic,
        "parameters": {
            name: {"type": p.type_name, "required": p.required, "default": _default(p)}
            for name, p in shape.parameters.items()
        },
        "schema": shape_schema(shape),
        "example": example(shape.name),
    }


def _parameter_schema(parameter: Parameter) -> Schema:
    schema = _type_schema(parameter.hint)
    return schema if parameter.required else {**schema, "default": _default(parameter)}


def _type_schema(hint: Any) -> Schema:
    if get_origin(hint) is Annotated:
        return _READERS.get(get_args(hint)[1], {"not": {}})
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is list:
        return {"type": "array", "items": _type_schema(get_args(hint)[0]), "maxItems": limits.LIST_ITEMS}
    return _PLAIN[hint]


def _default(parameter: Parameter) -> Any:
    if parameter.default is inspect.Parameter.empty:
        return None
    return list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
