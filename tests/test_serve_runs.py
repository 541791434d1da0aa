"""Run folders over HTTP: what is in them, while they grow, and nothing beside them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmtrain.serve import limits, runs
from llmtrain.serve.refusals import Refusal
from llmtrain.train.metrics import MetricsLog


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": step, "loss": 5.0 - step / 100, **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One run of ten updates, and a secret beside the folder of runs."""
    log = MetricsLog(tmp_path / "runs" / "first")
    log.append({"kind": "validation", "step": 0, "loss": 7.0})
    for step in range(1, 11):
        log.append(row(step))
    (tmp_path / "runs" / "first" / "config.yaml").write_text(
        "run: {name: first}\nschedule: {name: cosine, peak: 6e-4}\n"
    )
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text(json.dumps(row(1, secret="yes")) + "\n")
    return tmp_path / "runs"


def rows(root: Path, after: int = 0, file: str | None = None, limit: int = 1000, kind: Any = None) -> dict[str, Any]:
    return runs.read_rows(root, "first", after, file, limit, kind)


def test_runs_are_listed_with_their_newest_rows(root: Path) -> None:
    """The list would show where a run once was, or name what is no run."""
    (root / "empty").mkdir()
    (root / "metrics.jsonl").write_text("{}\n")
    [first] = runs.list_runs(root)
    assert first["name"] == "first"
    assert first["last_step"]["step"] == 10 and first["last_validation"]["loss"] == 7.0
    assert first["bytes"] == (root / "first" / "metrics.jsonl").stat().st_size
    shown = runs.show_run(root, "first")
    assert shown["config"] == {"run": {"name": "first"}, "schedule": {"name": "cosine", "peak": 6e-4}}


def test_a_config_that_unfolds_is_not_shown(root: Path) -> None:
    """A kilobyte of YAML with aliases of aliases would become gigabytes of JSON."""
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    (root / "first" / "config.yaml").write_text("\n".join(lines))
    assert runs.show_run(root, "first")["config"] is None


def test_pages_make_the_whole(root: Path) -> None:
    """A page that reads piece by piece would lose or repeat an update."""
    found, after = [], 0
    while True:
        page = rows(root, after, limit=3)
        found += page["rows"]
        after = page["next"]
        if after == page["size"]:
            break
    assert [one["step"] for one in found] == list(range(11))
    assert [one["step"] for one in rows(root, kind="validation")["rows"]] == [0]


def test_a_growing_run_is_followed(root: Path) -> None:
    """A page would miss the row that was being written while it asked."""
    path = root / "first" / "metrics.jsonl"
    seen = rows(root)
    with path.open("a") as file:
        file.write(json.dumps(row(11))[:10])
        file.flush()
        torn = rows(root, seen["next"], seen["file"])
        assert torn["rows"] == [] and torn["next"] == seen["next"] < torn["size"]
        file.write(json.dumps(row(11))[10:] + "\n")
    whole = rows(root, torn["next"], torn["file"])
    assert [one["step"] for one in whole["rows"]] == [11] and not whole["restarted"]


def test_a_resume_starts_the_reader_over(root: Path) -> None:
    """After a resume a page would show the updates that were taken back beside the ones that replaced them."""
    seen = rows(root)
    log = MetricsLog(root / "first")
    log.rewind(4)
    for step in range(5, 30):
        log.append(row(step, attempt=2))
    anew = rows(root, seen["next"], seen["file"])
    assert anew["restarted"] and [one["step"] for one in anew["rows"]] == list(range(30))
    assert rows(root, 10**9)["restarted"]


def test_rows_are_json_whatever_training_met(root: Path) -> None:
    """A run that diverged could not be looked at, because NaN is not JSON."""
    with (root / "first" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 11, "loss": NaN, "grad_norm": Infinity}\nnot json\n[1]\n')
        file.write('{"kind": "step", "step": 12, "loss": ' + "[" * 5000 + "]" * 5000 + "}\n")
    last = rows(root)["rows"][-1]
    assert (last["step"], last["loss"], last["grad_norm"]) == (11, None, None)
    assert rows(root)["next"] == rows(root)["size"]


def test_a_line_without_end_does_not_stop_the_reader(root: Path) -> None:
    """A damaged file would be asked for at the same place for ever."""
    with (root / "first" / "metrics.jsonl").open("a") as file:
        file.write("x" * (2 * limits.ROWS_BYTES) + "\n" + json.dumps(row(11)) + "\n")
    after, found = 0, []
    for _ in range(6):
        page = rows(root, after)
        found += page["rows"]
        after = page["next"]
    assert after == page["size"] and found[-1]["step"] == 11


@pytest.mark.parametrize(
    "name", ["../secret", "..", ".", "", "/etc", "first/../../secret", "a\0b", "x" * 300, "first/", "-x"]
)
def test_names_lead_nowhere_else(root: Path, name: str) -> None:
    """A client would read any metrics.jsonl on the machine."""
    with pytest.raises(Refusal) as refused:
        runs.read_rows(root, name, 0, None, 10, None)
    assert refused.value.status == 404


def test_links_lead_nowhere_else(root: Path) -> None:
    """Who may write into the folder of runs could show the service's client any file the service can read."""
    (root / "linked").symlink_to(root.parent / "secret")
    (root / "file").mkdir()
    (root / "file" / "metrics.jsonl").symlink_to(root.parent / "secret" / "metrics.jsonl")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "metrics.jsonl")
    (root / "first" / "config.yaml").unlink()
    (root / "first" / "config.yaml").symlink_to("/etc/passwd")
    for name in ("linked", "file", "pipe"):
        with pytest.raises(Refusal):
            runs.read_rows(root, name, 0, None, 10, None)
    assert [run["name"] for run in runs.list_runs(root)] == ["first"]
    assert runs.show_run(root, "first")["config"] is None
