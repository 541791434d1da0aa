"""How is the service tried as its users meet it? As a process of its own, over real sockets."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from llmtrain.cli import main; main(sys.argv[1:])",
    "serve",
    "--port",
    "0",
]
COSINE = {"name": "cosine", "peak": 3e-4, "warmup": "2000 steps", "horizon": "50000 steps", "floor": 0.1}
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    """A status, the headers in lower case, and the bytes of the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Service:
    """A running `llmtrain serve`."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, errors: Path, port: int) -> None:
        self.process, self.log, self.errors, self.port = process, log, errors, port

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            kind = JSON if data is not None else {}
            connection.request(method or ("GET" if data is None else "POST"), path, data, {**kind, **named})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def rate(self, step: int = 1000) -> float:
        """A good request, answered."""
        answer = self.ask("/lr_schedule", {"config": COSINE, "step": step})
        assert answer.status == 200, answer
        return float(answer.json["learning_rate"])

    def memory(self) -> int:
        """Resident bytes of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def running(*arguments: str, command: list[str] = COMMAND) -> Iterator[Service]:
    """The service, ready, with these options; it is ended with its workers when the block is left."""
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "log", Path(folder) / "errors"
        with log.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen([*command, *arguments], stdout=out, stderr=err, start_new_session=True)
        try:
            yield _ready(process, log, errors)
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(timeout=30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ready(process: "subprocess.Popen[bytes]", log: Path, errors: Path) -> Service:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, errors.read_text()
        first = log.read_text().partition("\n")[0]
        if first.endswith("}"):
            service = Service(process, log, errors, int(json.loads(first)["url"].rpartition(":")[2]))
            with contextlib.suppress(OSError, http.client.HTTPException):
                if service.ask("/readyz").status == 200:
                    return service
        time.sleep(0.02)
    raise AssertionError(f"not ready within a minute: {errors.read_text()}")
