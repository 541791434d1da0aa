"""How many learning rates does one worker serve, how soon is it ready, and how does it stand beside Flask?

    python tests/benchmarks/serving.py --seconds 30 --out tests/benchmarks/results/serving.json

Prints one JSON object. The load is wrk's (Debian: apt-get install wrk), 16 connections from one thread, a new update
number in every request; it takes its share of the same cores. Both services run one worker. Times are seconds.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-c", "import sys; from llmtrain.cli import main; main(sys.argv[1:])", "serve", "--port"]
FLASK = [sys.executable, "-m", "gunicorn", "--workers", "1", "--worker-class", "gthread", "--threads", "4"]
CONFIG = '{"name": "cosine", "peak": 3e-4, "warmup": "2000 steps", "horizon": "50000 steps", "floor": 0.1}'
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local update = 0
request = function()
  update = update % 50000 + 1
  return wrk.format(nil, nil, nil, '{"config": CONFIG, "step": ' .. update .. '}')
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format("FOUND %d %f %f %f %f %d",
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


@contextlib.contextmanager
def started(command: list[str], port: int, path: str) -> Iterator[tuple[int, float]]:
    """The process, and the seconds until `path` was answered."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not answered(f"http://127.0.0.1:{port}{path}"):
            assert process.poll() is None and time.perf_counter() - began < 60, "the service did not start"
            time.sleep(0.005)
        yield process.pid, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(timeout=60)


def answered(url: str) -> bool:
    """Whether anything comes back."""
    try:
        urllib.request.urlopen(url, timeout=5).read()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def load(pid: int, port: int, seconds: int) -> dict[str, Any]:
    """Requests a second, their times, and the processor time of each in the service with its children."""
    before = cpu_s(pid)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT.replace("CONFIG", CONFIG))
        script.flush()
        words = ["wrk", "-t1", "-c16", f"-d{seconds}s", "-s", script.name, f"http://127.0.0.1:{port}/lr_schedule"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    requests, taken, p50, p99, worst, errors = map(float, done.stdout.split("FOUND ")[1].split())
    return {
        "requests_per_s": round(requests / taken, 1),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
        "max_ms": round(worst, 2),
        "errors": int(errors),
        "seconds": round(taken, 1),
        "cpu_us_per_request": round((cpu_s(pid) - before) / requests * 1e6, 1),
    }


def cpu_s(pid: int) -> float:
    """Processor time of a process and its children, so far."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = 0
    for each in (pid, *children):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return round(int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="of load on each service")
    parser.add_argument("--port", type=int, default=8171)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    port = arguments.port
    starts = []
    for _ in range(5):
        with started([*COMMAND, str(port)], port, "/readyz") as (pid, seconds):
            starts.append(seconds)
            idle = resident_mib(pid)
    with started([*COMMAND, str(port)], port, "/readyz") as (pid, _):
        load(pid, port, 3)
        service = {**load(pid, port, arguments.seconds), "resident_mib": resident_mib(pid)}
    with started([*FLASK, "--bind", f"127.0.0.1:{port}", "tests.benchmarks.flask_route:app"], port, "/") as (pid, _):
        load(pid, port, 3)
        flask = load(pid, port, arguments.seconds)
    result = {
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "load": os.getloadavg(),
        },
        "start_s": {"median": round(statistics.median(starts), 3), "worst": round(max(starts), 3)},
        "resident_mib_when_ready": idle,
        "service": service,
        "flask_gunicorn": flask,
        "ratio": round(service["requests_per_s"] / flask["requests_per_s"], 2),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
