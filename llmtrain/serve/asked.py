"""What does a request ask for?

Bodies are JSON objects with strict types. A field of the request takes the form written here; what stands inside a
`config` is read in `llmtrain.serve.configs`.
"""

from typing import Annotated, Any, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, WithJsonSchema, model_validator
from typing_extensions import Self

from llmtrain.config import Section
from llmtrain.errors import did_you_mean
from llmtrain.schedules.conventions import CONVENTIONS
from llmtrain.serve import limits
from llmtrain.serve.refusals import Problem, Refusal, problems_of, refuse, shortened

SectionT = TypeVar("SectionT", bound=BaseModel)

BATCH_PATTERN = r"^ *[0-9][0-9_]*(\.[0-9]+)?([eE]\+?[0-9]{1,2})? *[KMG]? *$"


def _known_convention(name: str) -> str:
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention{did_you_mean(name, CONVENTIONS)}")
    return name


Text = Annotated[str, Field(min_length=1, max_length=limits.TEXT_CHARACTERS)]
Convention = Annotated[Text, AfterValidator(_known_convention), WithJsonSchema({"enum": sorted(CONVENTIONS)})]
Update = Annotated[int, Field(strict=True, ge=0, le=limits.LARGEST)]
Batch = (
    Annotated[int, Field(ge=1, le=limits.LARGEST)]
    | Annotated[str, Field(max_length=limits.TEXT_CHARACTERS, pattern=BATCH_PATTERN)]
)


class Setting(Section):
    """What a schedule depends on besides its own section."""

    tokens_per_update: Batch | None = Field(
        None, description="the global batch, 524288 or 4M; needed where a length is written in tokens", examples=["4M"]
    )
    beta2: float = Field(0.95, ge=0, le=1, description="AdamW's, for a warm-up written auto")


class Range(Section):
    """Updates `start`, `start + stride`, ... up to `stop`, which is one of them where a stride ends on it."""

    start: Update = 1
    stop: Update
    stride: int = Field(1, ge=1, le=limits.LARGEST)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.stop < self.start:
            raise ValueError(f"stop {self.stop} lies before start {self.start}")
        if len(self.updates) > limits.POINTS:
            raise ValueError(f"{len(self.updates)} points, wanted at most {limits.POINTS}: take a larger stride")
        return self

    @property
    def updates(self) -> range:
        return range(self.start, self.stop + 1, self.stride)


class Validation(Section):
    """The body of POST /validate, but for its setting."""

    config: Any = Field(description="what is to be judged: a ScheduleConfig, or what somebody takes for one")


class Comparison(Section):
    """The body of POST /compare, but for its setting."""

    configs: list[dict[str, Any]] = Field(min_length=1, max_length=limits.COMPARED_CONFIGS)
    labels: list[Text] = Field([], max_length=limits.COMPARED_CONFIGS, description="one for each config, or none")
    conventions: list[Convention] = Field([], max_length=len(CONVENTIONS), description="frameworks to lay over it")
    weight_decay: float = Field(0.1, ge=0, le=1)
    points: int = Field(
        400, ge=2, le=limits.CURVE_POINTS, description="of each curve, evenly spaced, and as many more by equal factors"
    )

    @model_validator(mode="after")
    def _a_label_each(self) -> Self:
        if self.labels and len(self.labels) != len(self.configs):
            raise ValueError(f"{len(self.labels)} labels for {len(self.configs)} configs: write one each, or none")
        return self


POINTS: dict[str, TypeAdapter[Any]] = {
    "step": TypeAdapter(Update),
    "steps": TypeAdapter(Annotated[list[Update], Field(min_length=1, max_length=limits.POINTS)]),
    "range": TypeAdapter(Range),
}


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` writes. Refuses what is not JSON, NaN, and nesting without end."""
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise refuse(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise refuse(422, "the body must be a JSON object")
    return values


def read_rates(values: dict[str, Any]) -> tuple[object, str, Any, Setting]:
    """The config of POST /lr_schedule, which of POINTS is written, its value, and the setting."""
    known = {"config", *POINTS, *Setting.model_fields}
    unknown = [key for key in values if key not in known]
    if unknown:
        problems = [
            Problem(field=shortened(key), message=f"unknown key{did_you_mean(key[:100], known)}") for key in unknown
        ]
        raise Refusal(422, problems[:20])
    if "config" not in values:
        raise refuse(422, "is missing", "config")
    written = [key for key in POINTS if key in values]
    if len(written) != 1:
        raise refuse(422, f"write exactly one of {', '.join(POINTS)}")
    key = written[0]
    try:
        points = POINTS[key].validate_python(values[key])
    except ValidationError as error:
        raise Refusal(422, problems_of(error, key)[:20]) from None
    return values["config"], key, points, read_setting(values)


def read_setting(values: dict[str, Any]) -> Setting:
    """The setting among the fields of a request."""
    return _read(Setting, {key: values[key] for key in Setting.model_fields if key in values})


def read_validation(values: dict[str, Any]) -> tuple[object, Setting]:
    """The config and setting of POST /validate."""
    return _read(Validation, _without_setting(values)).config, read_setting(values)


def read_comparison(values: dict[str, Any]) -> tuple[Comparison, Setting]:
    """What POST /compare asks for."""
    return _read(Comparison, _without_setting(values)), read_setting(values)


def _without_setting(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in Setting.model_fields}


def _read(section: type[SectionT], values: dict[str, Any]) -> SectionT:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise Refusal(422, problems_of(error)[:20]) from None
