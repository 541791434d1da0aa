"""metrics.jsonl is the truth: every update once, whatever happened in between."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.train.metrics import MetricsLog, perplexity, read_metrics


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": step, "loss": 1 / (step + 1), "attempt": 1, **more}


def filled(run: Path, *steps: int) -> MetricsLog:
    log = MetricsLog(run)
    for step in steps:
        log.append(row(step))
    return log


def steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run)]


def test_rewind_keeps_what_a_resume_goes_on_from_and_sets_the_rest_aside(tmp_path: Path) -> None:
    """An update made twice would stand twice, or rows would be lost for good."""
    log = filled(tmp_path, 1, 2, 3, 4, 5)
    before = log.path.read_text().splitlines()
    assert log.rewind(3) == 2
    assert log.path.read_text().splitlines() == before[:3]
    assert log.superseded.read_text().splitlines() == before[3:]
    assert log.rewind(3) == 0
    log.append(row(4))
    assert log.rewind(-1) == 4
    assert steps(tmp_path) == []
    assert [json.loads(line)["step"] for line in log.superseded.read_text().splitlines()] == [4, 5, 1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b'{"kind": "step", "st', b'{"kind": "step", "step": 4}'[:-1], b"\0\0\0\xff", b"[4]"])
def test_a_torn_last_line_is_survived(tmp_path: Path, torn: bytes) -> None:
    """A run killed while it wrote a row could be neither read nor resumed."""
    log = filled(tmp_path, 1, 2, 3)
    with log.path.open("ab") as file:
        file.write(torn)
    assert steps(tmp_path) == [1, 2, 3]
    log.rewind(3)
    log.append(row(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_an_attempt_is_never_numbered_twice(tmp_path: Path) -> None:
    """Rows of two different legs would look like one."""
    log = filled(tmp_path, 1, 2)
    assert log.next_attempt() == 2
    log.append(row(3, attempt=2))
    log.rewind(2)
    assert log.next_attempt() == 3
    assert MetricsLog(tmp_path / "new").next_attempt() == 1


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a minute would end the run, or leave a hole or half a row in its history."""
    log = filled(tmp_path, 1)
    real = Path.open

    class Full:
        """A file on a disk that takes ten more bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:10]))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, *words, **more: Full(real(path, *words, **more)))
        with pytest.warns(UserWarning, match="No space left on device; its rows wait in memory"):
            log.append(row(2))
        log.append(row(3))
        assert "No space left" in log.sync()
    assert steps(tmp_path) == [1]
    assert log.path.read_bytes().endswith(b"}\n")
    log.append(row(4))
    assert log.sync() == ""
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_perplexity_does_not_overflow() -> None:
    """A diverged run would end in a traceback instead of a number."""
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == float("inf")
