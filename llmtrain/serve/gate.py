"""What happens to every request before and after its route?

In: a token where one is wanted, and no body beyond the limit. Out: never a stack trace; one line of log, one count.
"""

import hmac
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmtrain.serve import limits
from llmtrain.serve.refusals import Refusal, refusal_response, refuse

AFTERWARDS = "llmtrain.afterwards"  # in a scope: what to call once the answer is sent
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PIECE = 64 * 1024
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
_log = logging.getLogger("llmtrain.serve")

Count = Callable[[str, str, int, float], None]  # method, route, status, seconds


class Gate:
    """ASGI middleware; it stands outside of the routes, and inside of CORS."""

    def __init__(self, app: ASGIApp, token: str | None, count: Count) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        began = time.perf_counter()
        try:
            await self._answered(scope, receive, answer)
        finally:
            scope.get(AFTERWARDS, _nothing)()
            self._note(scope, answer, time.perf_counter() - began)

    async def _answered(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            self._check(scope)
            await self.app(scope, _bounded(receive), answer.send)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, answer.send)
        except ClientDisconnect:
            answer.status = answer.status or 499
        except Exception:
            _log.exception("%s %.200s", scope["method"], scope["path"])
            if answer.status:  # begun already: the connection is cut
                raise
            await refusal_response(refuse(500, "the service failed; its log says why"))(scope, receive, answer.send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        closed = self.expected is not None and scope["path"] not in OPEN_PATHS
        if closed and not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            raise refuse(401, "send the header Authorization: Bearer TOKEN", www_authenticate="Bearer")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.BODY_BYTES:
            raise _too_large()

    def _note(self, scope: Scope, answer: "_Answer", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.count(method, route, answer.status, seconds)
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "client": (scope.get("client") or [""])[0],
            "method": method,
            "path": scope["path"][:200],
            "route": route,
            "status": answer.status,
            "ms": round(seconds * 1000, 3),
            "bytes": answer.bytes,
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


class Direct:
    """ASGI middleware for the one route that is asked all the time: FastAPI would take as long as the answer."""

    def __init__(self, app: ASGIApp, route: APIRoute) -> None:
        self.app = app
        self.route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self.route.path or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        scope["route"] = self.route
        response: Response = await self.route.endpoint(Request(scope, receive))
        await response(scope, receive, send)


def _nothing() -> None:
    """There is nothing to do afterwards."""


class _Answer:
    """What was sent of one answer. A long one goes out in pieces, so that a slow reader holds back the sender."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *_HEADERS]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self.bytes += len(body)
            if len(body) > _PIECE:
                for start in range(0, len(body), _PIECE):
                    piece = {"type": message["type"], "body": body[start : start + _PIECE], "more_body": True}
                    await self._send(piece)
                message = {**message, "body": b""}
        await self._send(message)


def _bounded(receive: Receive) -> Receive:
    """Refuses a body that grows beyond the limit, whatever its headers said."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limits.BODY_BYTES:
            raise _too_large()
        return message

    return bounded


def _too_large() -> Refusal:
    return refuse(413, f"the body has more than {limits.BODY_BYTES} bytes")
