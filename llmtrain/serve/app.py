"""Which route answers what?

The routes that are asked all the time read and write their own bytes; what they take stands in `described`, and the
OpenAPI document is built from both.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic_core
from fastapi import FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from llmtrain import __version__
from llmtrain.serve import answers, catalogue, described, gauges, limits, runs
from llmtrain.serve.asked import read_json
from llmtrain.serve.described import refused
from llmtrain.serve.gate import AFTERWARDS, Direct, Gate
from llmtrain.serve.page import page
from llmtrain.serve.refusals import Problem, Refusal, refusal_response, refuse, shortened
from llmtrain.serve.settings import Settings

_DESCRIPTION = (
    "Learning-rate schedules as pure functions of the update number k, counted from 1: those that training uses. "
    "Run folders can be read and followed."
)
RunName = Annotated[str, InPath(pattern=runs.NAME_PATTERN, description="a folder under --runs")]
After = Annotated[int, Query(ge=0, le=limits.LARGEST, description="byte to go on from: `next` of the answer before")]
FileId = Annotated[
    str | None, Query(max_length=64, pattern="^[0-9a-f]+-[0-9a-f]+$", description="`file` of that answer")
]
Limit = Annotated[int, Query(ge=1, le=limits.ROWS, description="most rows in the answer")]
Kind = Annotated[Literal["step", "validation"] | None, Query(description="rows of this kind alone")]


class Workbench:
    """Two threads for large requests, and as many of those at once as memory allows, until their answers are sent."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="large")
        self.taken = 0

    async def do(self, request: Request, work: Callable[..., bytes], *arguments: Any) -> bytes:
        """Run `work` in a thread. Refuses (503) where there are too many, or it takes too long."""
        if self.taken >= limits.SLOTS:
            raise refuse(503, "too many large requests at once: try again", retry_after="1")
        self.taken += 1
        future = asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)
        request.scope[AFTERWARDS] = lambda: future.add_done_callback(self._free)
        try:
            return await asyncio.wait_for(asyncio.shield(future), limits.REQUEST_SECONDS)
        except asyncio.TimeoutError:
            raise refuse(503, f"no answer within {limits.REQUEST_SECONDS:g} seconds", retry_after="1") from None

    def _free(self, future: "asyncio.Future[bytes]") -> None:
        self.taken -= 1
        if not future.cancelled():
            future.exception()  # nobody waits for it after a timeout


def create(settings: Settings) -> FastAPI:
    """The whole service as an ASGI application."""
    app = FastAPI(title="llmtrain", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None)
    bench = Workbench()
    _add_schedules(app, bench)  # first of all /lr_schedule
    _add_probes(app)
    _add_runs(app, bench, settings.runs)
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_middleware(Direct, route=next(one for one in app.routes if isinstance(one, APIRoute)))
    app.add_middleware(Gate, token=settings.token, count=_count)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_probes(app: FastAPI) -> None:
    html, policy = page()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return Response(html, media_type="text/html", headers={"content-security-policy": policy})

    @app.get("/healthz", response_model=described.Health, tags=["service"])
    async def healthz() -> Response:
        """The process lives."""
        return _json(b'{"status": "alive"}')

    @app.get("/readyz", response_model=described.Health, tags=["service"])
    async def readyz() -> Response:
        """Requests are answered."""
        return _json(b'{"status": "ready"}')

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **refused(401)},
        tags=["service"],
    )
    async def metrics() -> Response:
        """Counts and times of requests, for Prometheus, over all workers."""
        return Response(gauges.exposition(), headers={"content-type": gauges.CONTENT_TYPE})


def _add_schedules(app: FastAPI, bench: Workbench) -> None:
    posted = refused(400, 401, 413, 415, 422, 503)

    @app.post(
        "/lr_schedule",
        response_model=described.Rates,
        responses=posted,
        openapi_extra=described.LR_SCHEDULE,
        tags=["schedules"],
    )
    async def lr_schedule(request: Request) -> Response:
        """The learning rate of an update (`step`), of several (`steps`), or of a `range` of them."""
        body = await _body(request)
        values = read_json(body)
        if len(body) > limits.SMALL_BYTES or answers.is_large(values):
            return _json(await bench.do(request, answers.lr_schedule, values))
        return _json(answers.lr_schedule(values))

    @app.post(
        "/validate",
        response_model=described.Validity,
        responses=posted,
        openapi_extra=described.VALIDATE,
        tags=["schedules"],
    )
    async def validate(request: Request) -> Response:
        """Whether a config can be planned, and everything that is wrong with it."""
        body = await _body(request)
        values = read_json(body)
        if len(body) > limits.SMALL_BYTES:
            return _json(await bench.do(request, answers.validate, values))
        return _json(answers.validate(values))

    @app.post(
        "/compare",
        response_model=described.Comparisons,
        responses=posted,
        openapi_extra=described.COMPARE,
        tags=["schedules"],
    )
    async def compare(request: Request) -> Response:
        """The numbers and curves of several configs, and what other frameworks make of the same words."""
        return _json(await bench.do(request, answers.compare, read_json(await _body(request))))

    listed = pydantic_core.to_json(catalogue.all_schedules())

    @app.get("/schedules", response_model=described.Catalogue, responses=refused(401), tags=["schedules"])
    async def schedules() -> Response:
        """Every registered schedule: what it is, its parameters, and a JSON Schema of its config."""
        return _json(listed)

    @app.get("/schedules/{name}", response_model=described.Listed, responses=refused(401, 404, 422), tags=["schedules"])
    async def schedule(name: Annotated[str, InPath(max_length=limits.TEXT_CHARACTERS)]) -> Response:
        """One registered schedule."""
        return _json(pydantic_core.to_json(catalogue.one_schedule(name)))


def _add_runs(app: FastAPI, bench: Workbench, root: Path | None) -> None:
    def folder() -> Path:
        if root is None or not root.is_dir():
            raise refuse(404, "no runs are served: start the service with --runs DIR")
        return root

    @app.get("/runs", response_model=described.Runs, responses=refused(401, 404, 503), tags=["runs"])
    async def list_runs(request: Request) -> Response:
        """The run folders, each with its newest rows."""
        return _json(await bench.do(request, lambda: _encoded({"runs": runs.list_runs(folder())})))

    @app.get("/runs/{name}", response_model=described.RunShown, responses=refused(401, 404, 422, 503), tags=["runs"])
    async def show_run(request: Request, name: RunName) -> Response:
        """One run: its config and its newest rows."""
        return _json(await bench.do(request, lambda: _encoded(runs.show_run(folder(), name))))

    @app.get(
        "/runs/{name}/metrics", response_model=described.Rows, responses=refused(401, 404, 422, 503), tags=["runs"]
    )
    async def read_rows(
        request: Request, name: RunName, after: After = 0, file: FileId = None, limit: Limit = 1000, kind: Kind = None
    ) -> Response:
        """Rows of a run's metrics.jsonl, page by page, also while the run goes on."""
        return _json(
            await bench.do(request, lambda: _encoded(runs.read_rows(folder(), name, after, file, limit, kind)))
        )


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refuse(415, "send the header Content-Type: application/json")
    return await request.body()


def _encoded(value: dict[str, Any]) -> bytes:
    return pydantic_core.to_json(value, inf_nan_mode="null")


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _count(method: str, route: str, status: int, seconds: float) -> None:
    count, times = gauges.of(method, route, str(status))
    count.inc()
    times.observe(seconds)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refusal_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """What FastAPI found wrong in a path or a query."""
    assert isinstance(error, RequestValidationError)
    found = [
        Problem(field=".".join(str(key) for key in fault["loc"][1:]) or None, message=shortened(fault["msg"]))
        for fault in error.errors()
    ]
    return refusal_response(Refusal(422, found))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = Problem(field=None, message=f"{error.detail}; GET /openapi.json describes the routes")
    return refusal_response(Refusal(error.status_code, [problem], dict(error.headers or {})))


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        document["components"]["schemas"].update(described.components())
        app.openapi_schema = document
    return app.openapi_schema
