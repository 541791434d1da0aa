"""The service as it is run: started, asked, watched, loaded, and ended."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main
from tests.service import COSINE, Service, running

ROOT = Path(__file__).parent.parent
REQUEST = json.dumps({"config": COSINE, "step": 1000})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    run = folder / "runs" / "demo_cosine"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 5.0}\n')
    with running("--runs", str(folder / "runs"), "--cors", "https://page.example") as started:
        yield started


def test_the_commands_of_the_manual_answer(service: Service, tmp_path: Path) -> None:
    """The first thing a newcomer types would fail."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (ROOT / "docs" / "service.md").read_text() + (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [text for block in blocks for text in re.split(r"\n(?=\S)", block) if text.startswith("curl")]
    assert len(commands) >= 6
    for command in commands:
        here = command.replace("localhost:8000", f"localhost:{service.port}").replace("curl ", "curl --fail-with-body ")
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=30, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stdout)
    answers = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert json.loads(answers[0])["learning_rate"] == service.rate(1000)


def test_answers_are_marked_and_logged(service: Service) -> None:
    """A browser would guess what an answer is, and nobody could say afterwards who asked for what."""
    answer = service.ask("/lr_schedule?from=test", json.loads(REQUEST))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers
    line = json.loads(service.log.read_text().splitlines()[-1])
    assert (line["method"], line["path"], line["route"], line["status"]) == (
        "POST",
        "/lr_schedule",
        "/lr_schedule",
        200,
    )
    assert line["ms"] > 0 and line["bytes"] == len(answer.body) and line["client"] == "127.0.0.1"


def test_the_page_may_load_nothing_from_elsewhere(service: Service) -> None:
    """A script that found its way into the page could send what it shows to anybody."""
    answer = service.ask("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_only_the_named_origin_may_ask(service: Service) -> None:
    """Any page in the user's browser could read the runs."""
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    named = service.ask("/lr_schedule", method="OPTIONS", Origin="https://page.example", **asked)
    assert named.headers["access-control-allow-origin"] == "https://page.example"
    other = service.ask("/lr_schedule", method="OPTIONS", Origin="https://other.example", **asked)
    assert other.status == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/nothing", "GET", 404), ("/lr_schedule", "GET", 405), ("/runs", "DELETE", 405), ("/runs/none", "GET", 404)],
)
def test_every_refusal_has_one_form(service: Service, path: str, method: str, status: int) -> None:
    """A client would need another parser for every mistake."""
    answer = service.ask(path, method=method)
    assert answer.status == status and answer.json["errors"][0]["message"]


def test_json_must_be_called_so(service: Service) -> None:
    """Any page in a browser could post without asking first."""
    assert service.ask("/lr_schedule", REQUEST.encode(), Content_Type="text/plain").status == 415


def test_a_token_closes_the_service(tmp_path: Path) -> None:
    """Whoever reaches the port could read the runs of a service that has a token; no probe could reach it either."""
    token = "correct-horse-battery-staple"
    (tmp_path / "token").write_text(token + "\n")
    with running("--token-file", str(tmp_path / "token"), "--runs", str(tmp_path)) as service:
        for path in ("/schedules", "/metrics", "/runs", "/openapi.json", "/nothing"):
            answer = service.ask(path)
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer", path
            assert service.ask(path, Authorization=f"Bearer {token}x").status == 401
            assert service.ask(path, Authorization=f"Bearer {token}").status in (200, 404)
        assert service.ask("/lr_schedule", json.loads(REQUEST)).status == 401
        assert [service.ask(path).status for path in ("/", "/healthz", "/readyz")] == [200, 200, 200]
        assert token not in service.log.read_text() + service.errors.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token-file", "none"], "cannot read none"),
        (["--token-file", "short"], "at least 16 characters"),
        (["--port", "TAKEN"], "choose another --port"),
        (["--port", "SERVED"], "choose another --port"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    service: Service,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A user would read a traceback instead of what to do."""
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"TAKEN": str(taken.getsockname()[1]), "SERVED": str(service.port)}
        words = [ports.get(word, word) for word in arguments]
        with pytest.raises(SystemExit) as ended:
            main(["serve", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


class Client(threading.Thread):
    """Asks without pause until the service refuses to connect; keeps its connection as long as it is let."""

    def __init__(self, port: int, keep: bool) -> None:
        super().__init__()
        self.port, self.keep = port, keep
        self.answered = 0
        self.lost: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while True:
            try:
                if connection.sock is None:
                    connection.connect()
            except ConnectionRefusedError:
                return
            try:
                connection.request("POST", "/lr_schedule", REQUEST, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                whole = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.lost.append(repr(error))
                return
            assert whole["learning_rate"] == 1.5e-4
            self.answered += 1
            if not self.keep:
                connection.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_request_is_lost_when_the_service_ends(workers: int) -> None:
    """Every new version of a deployment would cost some clients an error."""
    with running("--workers", str(workers)) as service:
        clients = [Client(service.port, keep=index % 4 != 3) for index in range(8)]
        for client in clients:
            client.start()
        deadline = time.monotonic() + 30
        while min(client.answered for client in clients) < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        before = sum(client.answered for client in clients)
        assert service.stop() == 0
        for client in clients:
            client.join(timeout=30)
        assert [client.lost for client in clients] == [[]] * len(clients)
        assert before >= 160 and sum(client.answered for client in clients) > before
        assert "traceback" not in service.errors.read_text()


def test_a_slow_request_in_flight_is_answered() -> None:
    """A large request would be cut off in the middle of its answer."""
    with running() as ending:
        connection = http.client.HTTPConnection("127.0.0.1", ending.port, timeout=30)
        config = {**COSINE, "horizon": "900000 steps"}
        body = json.dumps({"configs": [config]})
        connection.request("POST", "/compare", body, {"Content-Type": "application/json"})
        time.sleep(0.1)  # it takes longer than that
        ending.process.send_signal(signal.SIGTERM)
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["schedules"]
        assert ending.process.wait(timeout=30) == 0


def test_a_worker_that_dies_is_replaced() -> None:
    """One crash would halve the service for good."""
    with running("--workers", "2") as service:
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(int(workers[0]), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            now = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
            fresh = [pid for pid in now if pid not in children]
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                if fresh and all(service.rate() for _ in range(20)):
                    return
            time.sleep(0.1)
        pytest.fail("no worker took the dead one's place")


def test_prometheus_counts_every_request(tmp_path: Path) -> None:
    """The operator's graphs would show the requests of one worker as those of all."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    with running("--workers", "2") as service:
        for index in range(60):
            assert service.ask("/lr_schedule", json.loads(REQUEST) if index % 3 else {"step": 1}).status in (200, 422)
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        (tmp_path / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: llmtrain\n"
            f"  static_configs: [{{targets: ['127.0.0.1:{service.port}']}}]\n"
        )
        command = [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        with (tmp_path / "log").open("wb") as log:
            watcher = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            ok = 'sum(llmtrain_http_requests_total{route="/lr_schedule",status="200"})'
            bad = 'sum(llmtrain_http_requests_total{route="/lr_schedule",status="422"})'
            timed = 'sum(llmtrain_http_request_seconds_count{route="/lr_schedule"})'
            assert [wait_for(port, query) for query in (ok, bad, timed)] == [40, 20, 60]
        finally:
            watcher.terminate()
            watcher.wait(timeout=30)


def wait_for(port: int, query: str) -> float:
    """What Prometheus says, once it has scraped."""
    deadline = time.monotonic() + 40
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            result: list[Any] = json.loads(urllib.request.urlopen(url).read())["data"]["result"]
            if result:
                return float(result[0]["value"][1])
        time.sleep(0.2)
    raise AssertionError(f"{query} had no answer")
