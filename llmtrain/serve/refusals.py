"""How does the service say no?

Every refusal, from a misspelt key to a wrong path, has one form: `{"errors": [{"field": ..., "message": ...}]}`.
`field` is the place in the request, null where no single one is to blame.
"""

import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

_MESSAGE_CHARACTERS = 500


class Problem(BaseModel):
    """One thing that is wrong."""

    model_config = ConfigDict(frozen=True)

    field: str | None = Field(description="the place in the request, such as config.peak; null where none is to blame")
    message: str


class Problems(BaseModel):
    """Why a request was refused."""

    errors: list[Problem] = Field(min_length=1)


class Refusal(Exception):  # noqa: N818
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, problems: Sequence[Problem], headers: dict[str, str] | None = None) -> None:
        super().__init__(problems)
        self.status = status
        self.problems = problems
        self.headers = headers or {}


def refuse(status: int, message: str, field: str | None = None, **headers: str) -> Refusal:
    """A refusal with one problem. `headers` are written with _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Refusal(status, [Problem(field=field, message=shortened(message))], named)


def refusal_response(refusal: Refusal) -> Response:
    """What the client gets."""
    errors = [problem.model_dump() for problem in refusal.problems]
    body = json.dumps({"errors": errors}, allow_nan=False)
    return Response(body, refusal.status, refusal.headers, media_type="application/json")


def problems_of(error: ValidationError, prefix: str = "") -> list[Problem]:
    """What pydantic found, field by field."""
    found = []
    for fault in error.errors(include_url=False, include_context=False):
        place = ".".join(str(key) for key in fault["loc"])
        field = f"{prefix}.{place}" if prefix and place else prefix or place or None
        message = fault["msg"].removeprefix("Value error, ")
        found.append(Problem(field=field, message=shortened(message)))
    return found


def shortened(message: str) -> str:
    """A message that does not send a large request back."""
    return message if len(message) <= _MESSAGE_CHARACTERS else message[: _MESSAGE_CHARACTERS - 1] + "…"
