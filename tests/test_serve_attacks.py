"""What a hostile or careless client can do to the service: nothing to the others."""

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.serve import limits
from tests.service import COSINE, Service, running

FULL = bool(os.environ.get("LLMTRAIN_FULL"))
PATIENCE = limits.REQUEST_SECONDS if FULL else 1.0
IDLE = 1000
IMPATIENT = [
    sys.executable,
    "-c",
    "import sys; from llmtrain.serve import limits; from llmtrain.cli import main; "
    f"limits.REQUEST_SECONDS = limits.KEEP_ALIVE_SECONDS = {PATIENCE}; main(sys.argv[1:])",
    "serve",
    "--port",
    "0",
]
HEAD = b"POST /lr_schedule HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    runs = tmp_path_factory.mktemp("runs")
    with running("--runs", str(runs), command=IMPATIENT) as started:
        yield started


@pytest.fixture(autouse=True)
def unharmed(service: Service) -> Iterator[None]:
    """After every attack the service answers, is no larger than it may be, and has logged no failure of its own."""
    service.rate()
    yield
    assert service.rate(1000) == 1.5e-4
    assert service.memory() < 256 * 2**20
    assert "traceback" not in service.errors.read_text()


def spoken(service: Service, data: bytes, seconds: float = 20.0) -> bytes:
    """What comes back for these bytes until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=seconds) as client:
        received = b""
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(65536):
                received += piece
        return received


def config(**changed: Any) -> dict[str, Any]:
    return {**COSINE, **changed}


REFUSED = {
    "a billion points": {"config": COSINE, "range": {"start": 1, "stop": 10**9}},
    "too many steps": {"config": COSINE, "steps": list(range(20_000)) * 6},
    "infinity by digits": b'{"config": {"name": "cosine", "peak": 1e999, "horizon": "10 steps"}, "step": 1}',
    "NaN": b'{"config": {"name": "cosine", "peak": NaN, "horizon": "10 steps"}, "step": 1}',
    "minus infinity": b'{"config": {"name": "cosine", "peak": -Infinity, "horizon": "10 steps"}, "step": 1}',
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"config":' * 20_000 + b"1" + b"}" * 20_000,
    "deep in a config": {"config": config(knots=json.loads("[" * 100 + "]" * 100)), "step": 1},
    "a chain of chains": {"config": json.loads('{"name":"chain","pieces":[' * 60 + "]}" * 60), "step": 1},
    "a huge number": {"config": config(horizon=f"{'9' * 90} steps"), "step": 1},
    "a huge exponent": {"config": config(horizon="1e999999999 steps"), "step": 1},
    "a huge exponent as batch": {"config": COSINE, "tokens_per_update": "1e999999999", "step": 1},
    "a huge exponent in a piece": {
        "config": config(name="chain", pieces=[{"name": "linear", "length": "1e999999999 steps"}]),
        "step": 1,
    },
    "a huge exponent in a knot": {"config": config(name="piecewise", knots=[["1e99999999 steps", 1]]), "step": 1},
    "a huge update": {"config": COSINE, "step": 2**64},
    "a negative update": {"config": COSINE, "step": -1},
    "an update in a text": {"config": COSINE, "step": "1"},
    "a fraction of an update": {"config": COSINE, "step": 1.5},
    "true as update": {"config": COSINE, "step": True},
    "endless cycles": {"config": config(name="sgdr", cycles=10**9), "step": 1},
    "a long word": {"config": config(warmup_shape="x" * 10_000), "step": 1},
    "a long key": {"config": config(**{"x" * 10_000: 1}), "step": 1},
    "a key for each byte": {"config": {f"k{i}": i for i in range(12_000)}, "step": 1},
    "spaces without end": {"config": config(horizon=" " * 200_000), "step": 1},
    "a module": {"config": config(module="/etc/passwd.py"), "step": 1},
    "a module in a chain": {
        "config": config(name="chain", pieces=[{"name": "linear", "module": "x.py"}]),
        "step": 1,
    },
    "a file of knots": {"config": config(name="piecewise", warmup=0, knots="/etc/passwd"), "step": 1},
    "a file of norms": {"config": config(name="refined", warmup=0, norms="/proc/self/environ"), "step": 1},
    "a file in a chain": {
        "config": config(name="chain", pieces=[{"name": "refined", "norms": "/etc/passwd"}]),
        "step": 1,
    },
    "a file in a chain in a chain": {
        "config": config(
            name="chain", pieces=[{"name": "chain", "pieces": [{"name": "piecewise", "knots": "/etc/passwd"}]}]
        ),
        "step": 1,
    },
    "not an object": b"[]",
    "nothing": b"",
    "not UTF-8": b'{"config": "\xff\xfe"}',
    "a config that is none": {"config": [1, 2], "step": 1},
    "two kinds of points": {"config": COSINE, "step": 1, "steps": [1]},
    "an unknown key": {"config": COSINE, "step": 1, "file": "/etc/passwd"},
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_refused_with_a_reason(service: Service, body: Any) -> None:
    """A request that costs more than it shows, or reads what is not the client's, would be answered."""
    answer = service.ask("/lr_schedule", body)
    assert answer.status in (400, 413, 422), answer
    assert answer.json["errors"][0]["message"]
    assert len(answer.body) < 20_000
    assert b"root:" not in answer.body and b"Traceback" not in answer.body and b'File "' not in answer.body


def test_a_comparison_is_bounded(service: Service) -> None:
    """One request would fill the memory with a horizon of 10**15 updates."""
    answer = service.ask("/compare", {"configs": [config(horizon="1000000000000000 steps")]})
    assert answer.status == 422 and answer.json["errors"][0]["field"] == "configs[0].horizon"


def test_large_bodies_are_not_read(service: Service) -> None:
    """Ten megabytes from each of a few clients would fill the memory, with or without a length in front."""
    big = b'{"config": "' + b"x" * 10 * 2**20
    assert service.ask("/lr_schedule", b"{" + b" " * limits.BODY_BYTES).status == 413
    said = spoken(service, HEAD + b"Content-Length: %d\r\n\r\n" % len(big) + big[: 2**16])
    assert said.startswith(b"HTTP/1.1 413")
    spoken(service, HEAD + b"Content-Length: %d\r\n\r\n" % len(big) + big)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert b"HTTP/1.1 200" not in spoken(service, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 160)
    tiny = b"1\r\n \r\n" * 400_000
    assert b"HTTP/1.1 200" not in spoken(service, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + tiny)


def test_endless_headers_are_cut_off(service: Service) -> None:
    """Headers that never end would be kept in memory."""
    many = b"".join(b"x-%d: y\r\n" % i for i in range(200_000))
    assert b"HTTP/1.1 200" not in spoken(service, HEAD + many)
    assert b"HTTP/1.1 200" not in spoken(service, b"GET /" + b"a" * 5_000_000)
    assert b"HTTP/1.1 200" not in spoken(service, HEAD + b"x: " + b"a" * 5_000_000)


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"\r\n",
        b"POST /lr",
        HEAD,
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["nothing", "an empty line", "half a line", "half the headers", "half a body", "no chunk"],
)
def test_a_request_that_dribbles_in_is_cut_off(service: Service, beginning: bytes) -> None:
    """Clients that send a byte now and then would hold every connection."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.settimeout(0.2)
        received = b""
        with contextlib.suppress(ConnectionError):
            client.sendall(beginning)
            while time.monotonic() < began + 3 * PATIENCE + 10:
                try:
                    piece = client.recv(65536)
                    received += piece
                    if not piece:
                        break
                except TimeoutError:
                    if beginning:
                        client.send(beginning[-1:] if beginning == b"\r\n" else b"1")
            else:
                pytest.fail("the connection was never closed")
    assert b"200 OK" not in received
    if beginning.startswith(HEAD):
        # a byte sent after the end resets what was said; enough of them make a chunk's length too long
        assert not received or re.match(rb"HTTP/1.1 40[08]", received)


def test_a_client_that_does_not_read_is_cut_off(service: Service) -> None:
    """Answers that nobody reads would pile up."""
    body = json.dumps({"config": COSINE, "range": {"start": 1, "stop": 100_000}}).encode()
    request = (HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 8  # more than the kernel keeps
    clients = []
    for _ in range(24):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", service.port))
        client.sendall(request)
        clients.append(client)
    service.rate()
    deadline = time.monotonic() + 2 * PATIENCE + 20
    held = len(clients)
    while held and time.monotonic() < deadline:
        held = connections(service)
        time.sleep(0.1)
    for client in clients:
        client.close()
    assert held == 0


def test_idle_connections_do_no_harm(service: Service) -> None:
    """A thousand clients that say nothing would keep out the one that asks."""
    clients = []
    for _ in range(IDLE):
        clients.append(socket.create_connection(("127.0.0.1", service.port)))
    for _ in range(20):
        service.rate()
    deadline = time.monotonic() + 2 * PATIENCE + 20
    while connections(service) and time.monotonic() < deadline:
        time.sleep(0.1)
    for client in clients:
        client.close()
    assert connections(service) == 0


def connections(service: Service) -> int:
    """Connections that the service holds, by its open sockets (the two that hold the port are not among them)."""
    inodes = set()
    for path in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            inodes.add(str(path.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[9] in inodes and row[3] == "01" for row in rows)


@pytest.mark.parametrize(
    "path",
    [
        "/runs/../../etc/passwd",
        "/runs/..%2f..%2fetc%2fpasswd",
        "/runs/%2e%2e",
        "/runs/%2e%2e/metrics",
        "/runs/.",
        "/runs//etc/passwd",
        "/runs/%00",
        "/runs/a%00b/metrics",
        "/runs/..%5c..%5cetc",
        "/runs/" + "a" * 5000,
        "/runs/x%0a/metrics",
        "/schedules/../runs",
        "/schedules/" + "a" * 5000,
    ],
)
def test_no_path_leads_out(service: Service, path: str) -> None:
    """A client would read files beside the runs."""
    answer = service.ask(path)
    assert answer.status in (404, 422), answer
    assert b"root:" not in answer.body


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(64),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
    ],
    ids=["TLS", "HTTP/2", "a version", "length below 0", "two lengths", "length and chunks", "no chunk", "a zero byte"],
)
def test_what_is_not_http_is_refused(service: Service, data: bytes) -> None:
    """A confused proxy would take part of a body for a request of somebody else."""
    said = spoken(service, data)
    assert not said or said.startswith(b"HTTP/1.1 4"), said
