"""How do the workers start, and how do they end?

Every worker has a socket of its own on the same port. SIGTERM ends it in order: what has reached the socket is taken
in, the socket is closed, requests in flight are answered, idle connections are told to close, and the exit code is 0.
"""

import asyncio
import json
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

import uvicorn

from llmtrain.errors import EnvironmentError
from llmtrain.serve import limits
from llmtrain.serve.connection import Connection
from llmtrain.serve.settings import Settings

_METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client reads it on import, so the app is imported after it
_SHORTEST_LIFE = 3.0  # seconds; a worker that gives up sooner would do so again


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises EnvironmentError where the port cannot be had."""
    _log_as_json()
    if settings.port:
        _bound(settings.host, settings.port, shared=False).close()  # another service would share it without a word
    with (
        _bound(settings.host, settings.port) as held,  # keeps the port, and is never listened on
        tempfile.TemporaryDirectory(prefix="llmtrain-serve-") as folder,
    ):
        os.environ[_METRICS_FOLDER] = folder
        port = held.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(json.dumps({"event": "listening", "url": f"http://{host}:{port}", "pid": os.getpid()}), flush=True)
        if settings.workers == 1:
            _work(settings, port)
        else:
            _supervise(settings, port)


class Server(uvicorn.Server):
    """uvicorn's, which leaves no connection unanswered in the socket that it closes."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order; uvicorn would raise the signal again when it is done, and the exit code would not be 0."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in who has connected, close the socket, then end as uvicorn does."""
        arrived = [client for listener in sockets or [] for client in _arrived(listener)]
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        loop = asyncio.get_running_loop()
        for client in arrived:
            client.setblocking(False)
            await loop.connect_accepted_socket(self._connection, client)
        await super().shutdown(sockets)

    def _connection(self) -> Connection:
        return Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _arrived(listener: socket.socket) -> list[socket.socket]:
    clients = []
    try:
        while True:
            clients.append(listener.accept()[0])
    except OSError:  # no more
        return clients


def _work(settings: Settings, port: int) -> None:
    """One worker, from start to end."""
    _log_as_json()
    from llmtrain.serve.app import create

    config = uvicorn.Config(
        create(settings),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_room_for_connections(),
        timeout_keep_alive=limits.KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=limits.SHUTDOWN_SECONDS,
    )
    Server(config).run([_bound(settings.host, port)])


def _supervise(settings: Settings, port: int) -> None:
    """Keep the workers running; a dead one is replaced, unless it gave up as soon as it had started."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    workers = {process.sentinel: process for process in (_started(settings, port) for _ in range(settings.workers))}
    began = time.monotonic()
    failed = None
    while not stopping and failed is None:
        for sentinel in wait(list(workers), timeout=0.2):
            process = workers.pop(sentinel)  # type: ignore[arg-type]
            if (process.exitcode or 0) > 0 and time.monotonic() - began < _SHORTEST_LIFE:
                failed = process
                break
            logging.getLogger("llmtrain.serve").error("worker %s ended with %s", process.pid, process.exitcode)
            began = time.monotonic()
            replacement = _started(settings, port)
            workers[replacement.sentinel] = replacement
    for process in workers.values():
        process.terminate()
    for process in workers.values():
        process.join()
    if failed is not None:
        raise EnvironmentError(
            f"a worker ended with exit code {failed.exitcode} as soon as it had started; see its log"
        )


def _started(settings: Settings, port: int) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(settings, port))
    process.start()
    return process


def _bound(host: str, port: int, shared: bool = True) -> socket.socket:
    """A socket on the port, which the workers share."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        bound.setblocking(False)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise EnvironmentError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        ) from None
    return bound


def _room_for_connections() -> int:
    """Connections that a worker may hold, after asking for as many file descriptors as it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.CONNECTIONS + 256
    allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    return min(limits.CONNECTIONS, max(allowed, soft) - 128)


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class _JsonLines(logging.Formatter):
    """One JSON object a line, a traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
