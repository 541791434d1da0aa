"""The OpenAPI document says what the service does: requests drawn from it, fitting and not, meet no surprise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.serve import limits
from tests.service import running

FULL = bool(os.environ.get("LLMTRAIN_FULL"))
PHASES = "examples,coverage,fuzzing" if FULL else "examples,fuzzing"
SEEDS = range(1, 5) if FULL else [1]
SETTINGS = """
[checks.positive_data_acceptance]  # what fits may still be no schedule, no run, or too much at once
expected-statuses = [200, 404, 413, 422, 503]
[checks.negative_data_rejection]
expected-statuses = [400, 404, 405, 413, 415, 422, 503]
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_the_document_is_true(tmp_path: Path, seed: int) -> None:
    """A client generated from the document would meet an answer that it does not know."""
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 5.0}\n')
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["--config-file", str(tmp_path / "schemathesis.toml"), "run"]
    options = ["--max-examples", "50", "--phases", PHASES, "--seed", str(seed), "--no-color"]
    with running("--runs", str(tmp_path / "runs")) as service:
        document = f"http://127.0.0.1:{service.port}/openapi.json"
        done = subprocess.run([*command, document, *options], cwd=tmp_path, capture_output=True, text=True)
        summary = done.stdout[-3000:]
        generated = re.search(r"(\d+) generated", done.stdout.replace(",", ""))
        assert done.returncode == 0, summary
        assert generated is not None and int(generated[1]) >= 200, summary
        assert "traceback" not in service.errors.read_text()
        assert service.memory() < 512 * 2**20
        print(f"{generated[1]} cases, {service.memory() / 2**20:.0f} MiB")


def test_every_route_is_described(tmp_path: Path) -> None:
    """A route that is not in the document has no user."""
    with running("--runs", str(tmp_path)) as service:
        document = service.ask("/openapi.json").json
        paths = document["paths"]
        assert set(paths) == {
            "/lr_schedule",
            "/validate",
            "/compare",
            "/schedules",
            "/schedules/{name}",
            "/runs",
            "/runs/{name}",
            "/runs/{name}/metrics",
            "/healthz",
            "/readyz",
            "/metrics",
        }
        for path in ("/lr_schedule", "/validate", "/compare"):
            route = paths[path]["post"]
            assert {"200", "400", "401", "413", "415", "422", "503"} <= set(route["responses"]), path
            for example in route["requestBody"]["content"]["application/json"]["examples"].values():
                assert service.ask(path, example["value"]).status == 200, example
        shapes = {one["title"] for one in document["components"]["schemas"]["ScheduleConfig"]["anyOf"]}
        assert shapes == {one["name"] for one in service.ask("/schedules").json["schedules"]}
        assert str(limits.BODY_BYTES) in json.dumps(document)
