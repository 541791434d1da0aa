"""What do the routes take and give, for the OpenAPI document? Answers of one route each, and examples."""

from typing import Any

from pydantic import BaseModel, Field

from llmtrain.serve import limits
from llmtrain.serve.asked import POINTS, Comparison, Setting, Validation
from llmtrain.serve.catalogue import config_schema, example
from llmtrain.serve.refusals import Problem, Problems

_CONFIG = {"$ref": "#/components/schemas/ScheduleConfig"}
_HASH = "names the function: equal hash, equal learning rates"


class Health(BaseModel):
    """Whether the service lives, or is ready."""

    status: str


class Rates(BaseModel):
    """The learning rate of an update, or those of many."""

    learning_rate: float | list[float]
    step: int | None = Field(None, description="the update that was asked for")
    steps: list[int] | None = Field(None, description="the updates that were asked for, in order")
    hash: str = Field(description=_HASH)


class Validity(BaseModel):
    """Whether a config can be planned."""

    valid: bool
    errors: list[Problem]
    hash: str | None = None
    spec: dict[str, Any] | None = None


class Listed(BaseModel):
    """One registered schedule."""

    name: str
    version: int
    doc: str
    ends: str = Field(description="floor, level (one of its own) or open (not annealed)")
    cyclic: bool = Field(description="may rise after the warm-up")
    parameters: dict[str, dict[str, Any]]
    config_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema of a config with this shape")
    example: dict[str, Any]


class Catalogue(BaseModel):
    """Every registered schedule, and the fields that all have."""

    schedules: list[Listed]
    common: dict[str, dict[str, Any]]


class Numbers(BaseModel):
    """What `llmtrain schedule show` says of a schedule; sums in the units of llmtrain.schedules.summary."""

    updates: int
    first_lrs: list[float]
    last_lrs: list[float]
    peak_lr: float
    peak_update: int
    area: float
    mean_multiplier: float
    decay_share: float
    sum_of_squares: float
    averaging_window: float | None
    effective_updates: float | None
    bound_ratio: float | None
    peak_ratio: float | None
    warnings: list[str]


class Overlay(BaseModel):
    """The same words as another framework reads them, or why it does not."""

    error: str | None = None
    hash: str | None = None
    summary: Numbers | None = None
    learning_rate: list[float] | None = None


class Compared(BaseModel):
    """One of the schedules that are looked at together."""

    label: str
    hash: str = Field(description=_HASH)
    spec: dict[str, Any]
    total_updates: int
    warmup_updates: int
    summary: Numbers
    updates: list[int] = Field(description="where the curve is drawn")
    learning_rate: list[float]
    conventions: dict[str, Overlay]


class Comparisons(BaseModel):
    """In the order of the configs."""

    schedules: list[Compared]


class RunSeen(BaseModel):
    """A run folder, by its newest rows."""

    name: str
    bytes: int
    modified: float = Field(description="seconds since 1970")
    last_step: dict[str, Any] | None
    last_validation: dict[str, Any] | None


class Runs(BaseModel):
    """Run folders by name."""

    runs: list[RunSeen]


class RunShown(RunSeen):
    """A run folder, with its config as it was written."""

    config: dict[str, Any] | None


class Rows(BaseModel):
    """Rows of metrics.jsonl."""

    rows: list[dict[str, Any]]
    next: int = Field(description="send it as `after` to go on reading")
    file: str = Field(description="send it along: it changes when a resume has written the file anew")
    size: int = Field(description="of the file; less than it is read as long as next is smaller")
    restarted: bool = Field(description="the file was written anew: forget earlier rows, these are from its beginning")


def operation(title: str, schema: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI cannot know of a route that reads its body itself."""
    named = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": {"title": title, **schema}, "examples": named}}
    return {"requestBody": {"required": True, "content": content}}


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ways in which a route refuses."""
    why = {
        400: "Not HTTP, or not JSON.",
        401: "A token is wanted (only where the service was started with one).",
        404: "There is no such thing.",
        405: "Another method is wanted.",
        408: "The request did not arrive in time.",
        413: f"The body has more than {limits.BODY_BYTES} bytes.",
        415: "The body must be application/json.",
        422: "A value is not acceptable.",
        503: "Busy: try again soon.",
    }
    return {status: {"model": Problems, "description": why[status]} for status in statuses}


_SETTING = Setting.model_json_schema()["properties"]
_COSINE = example("cosine")


def _with_setting(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    properties = schema["properties"]
    properties.update(_SETTING)
    if "configs" in properties:
        properties["configs"]["items"] = _CONFIG
    return schema


def _rates_schema() -> dict[str, Any]:
    points = {name: adapter.json_schema() for name, adapter in POINTS.items()}
    properties = {"config": _CONFIG, **points, **_SETTING}
    return {
        "type": "object",
        "required": ["config"],
        "oneOf": [{"required": [name]} for name in POINTS],
        "properties": properties,
        "additionalProperties": False,
    }


LR_SCHEDULE = operation(
    "RatesWanted",
    _rates_schema(),
    {
        "one update": {"config": _COSINE, "step": 1000},
        "some updates": {"config": example("wsd"), "steps": [1, 2000, 45000, 50000]},
        "evenly": {"config": example("linear"), "range": {"start": 1, "stop": 50000, "stride": 500}},
        "in tokens": {
            "config": {"name": "cosine", "peak": 3e-4, "warmup": "auto", "horizon": "8B tokens"},
            "step": 100,
            "tokens_per_update": "4M",
            "beta2": 0.95,
        },
    },
)
VALIDATE = operation(
    "ConfigToValidate", _with_setting(Validation), {"valid": {"config": _COSINE}, "not": {"config": {"name": "cosin"}}}
)
COMPARE = operation(
    "ComparisonWanted",
    _with_setting(Comparison),
    {"two": {"configs": [_COSINE, example("linear")], "conventions": ["hf", "torchtitan"], "points": 200}},
)


def components() -> dict[str, Any]:
    """Schemas that the requests refer to."""
    return {"ScheduleConfig": config_schema()}
