"""`llmtrain verify-resume`: an exact resume is verified, and of one that is not the first wrong component is named."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from llmtrain.cli_checkpoint import verify_resume
from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.errors import ConfigError, DataError, EnvironmentError, LlmtrainError
from llmtrain.train import verify as module
from llmtrain.train import verify_leg
from llmtrain.train.verify import Layout, Leg, Verification, run_processes, verify
from tests import ranks

AT, STEPS = 2, 4


def forked(leg: Leg) -> None:
    """A leg from the fork server: the same processes, but for the seconds that they take to start."""
    ranks.start(leg.out / "logs", leg.ranks, import_module(leg.module).main, leg.words).succeeded()


def verified(
    prepared: dict[str, Any],
    folder: Path,
    straight: Layout,
    resumed: Layout | None = None,
    launch: Callable[[Leg], None] = forked,
    **words: Any,
) -> Verification:
    return verify(
        validate(prepared, "test"),
        folder / "legs",
        prepare_command="llmtrain prepare --config mine.yaml",
        straight=straight,
        resumed=resumed or straight,
        launch=launch,
        say=print,
        **{"at": AT, "steps": STEPS, **words},
    )


@pytest.mark.parametrize("engine", ["single", "fsdp", "zero1", "zero2", "zero3"])
def test_an_exact_resume_is_verified(prepared: dict[str, Any], tmp_path: Path, engine: str) -> None:
    """A user with a sound machine would be told that it is not."""
    layout = Layout(engine, 1 if engine == "single" else 2)
    found = verified(prepared, tmp_path, layout)
    assert found.verdict == (f"VERIFIED {layout}, resumed after update 2: updates 3 to 4 are the same, bit for bit"), (
        found.findings
    )
    assert all(finding.bound == 0 for finding in found.findings)
    assert [finding.component for finding in found.findings] == [
        "weights as loaded",
        "moments as loaded",
        "generators as loaded",
        "learning rate",
        "weight decay",
        "sample ids",
        "loss",
        "gradient norm",
        "weights at the end",
        "moments at the end",
        "generators at the end",
    ]
    states = sorted(path.relative_to(tmp_path / "legs").as_posix() for path in tmp_path.rglob("state_0*"))
    assert states == [
        "interrupted/state_00000002",
        *(f"{leg}/state_0000000{update}" for leg in ("resumed", "straight") for update in (AT, STEPS)),
    ]


def test_another_layout_is_verified_within_what_it_prints(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user who moves to other machines could not know whether the run goes on, or would get a bound that hides it."""
    found = verified(prepared, tmp_path, Layout("zero3", 2), Layout("single", 1))
    assert found.differs is None, found.findings
    assert found.verdict.startswith("VERIFIED zero3 x 2, resumed after update 2 on single x 1: the same state, rates")
    assert "losses within 1e-05 (largest difference " in found.verdict
    bounded = [finding.component for finding in found.findings if finding.bound]
    assert bounded == ["loss", "gradient norm", "weights at the end", "moments at the end"]
    assert 0 < max(finding.largest for finding in found.findings) < 1e-3


def plant(fault: str) -> None:
    """Break this process in one place."""
    from llmtrain.checkpoint.flat import FlatReader
    from llmtrain.data import batches
    from llmtrain.schedules import Schedule
    from llmtrain.train import run

    rate, read = Schedule.__call__, FlatReader.read

    def late(schedule: Schedule, k: int) -> float:
        return rate(schedule, k + 1)

    def skipping(order: Any, update: int, sequences: int, since: Any) -> Any:
        return order.samples(since.through(update - 1, sequences) + 1, sequences)

    def forgetful(reader: FlatReader, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        whole = read(reader, name, kind, start, stop)
        return torch.zeros_like(whole) if (name, kind) == ("norm.weight", "exp_avg") else whole

    def rounded(reader: FlatReader, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        whole = read(reader, name, kind, start, stop)
        return whole.bfloat16().float() if kind == "weight" else whole

    where: dict[str, tuple[Any, str, Any]] = {
        "learning rate off by one": (Schedule, "__call__", late),
        "a sample skipped": (batches, "update_samples", skipping),
        "a moment zeroed": (FlatReader, "read", forgetful),
        "weights in bf16": (FlatReader, "read", rounded),
        "generators not restored": (run, "_restore_generators", lambda world, start: None),
    }
    setattr(*where[fault])


def faulty(fault: str, legs: str, words: list[str]) -> None:
    """One rank of a leg, broken where it is the leg that is to be."""
    if Path(words[1]).name == legs:
        plant(fault)
    verify_leg.main(words)


def breaking(fault: str, legs: str = "resumed") -> Callable[[Leg], None]:
    def launch(leg: Leg) -> None:
        ranks.start(leg.out / "logs", leg.ranks, faulty, fault, legs, leg.words).succeeded()

    return launch


FAULTS = {
    "learning rate off by one": ("learning rate", 3, "straight 0.0075"),
    "a sample skipped": ("sample ids", 3, "sequences are not those"),
    "a moment zeroed": ("moments as loaded", 2, "exp_avg of norm.weight[0] is 0, straight"),
    "weights in bf16": ("weights as loaded", 2, "weight of "),
    "generators not restored": ("generators as loaded", 2, "rank 0: python, numpy, torch"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_wrong_component_is_named(prepared: dict[str, Any], tmp_path: Path, fault: str) -> None:
    """A user would be told that a broken resume is sound, or be sent to look in the wrong place."""
    component, update, words = FAULTS[fault]
    found = verified(prepared, tmp_path, Layout("single", 1), launch=breaking(fault))
    assert found.differs is not None
    assert (found.differs.component, found.differs.update) == (component, update), found.findings
    assert words in found.differs.first
    assert found.verdict.startswith(f"DIFFERS: {component} at update {update}: ")
    before = found.findings[: found.findings.index(found.differs)]
    assert all(finding.ok for finding in before)


def test_a_fault_on_another_layout_is_not_within_its_bounds(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A bound that is too wide would let a lost moment pass."""
    found = verified(prepared, tmp_path, Layout("fsdp", 1), Layout("single", 1), breaking("a sample skipped"))
    wrong = [finding.component for finding in found.findings if not finding.ok]
    assert wrong == ["sample ids", "loss", "gradient norm", "weights at the end", "moments at the end"], found.findings


def test_a_machine_that_does_not_compute_the_same_twice_is_told_apart(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user would look for a fault in the resume where there is one in a kernel."""
    found = verified(
        prepared, tmp_path, Layout("single", 1), launch=breaking("learning rate off by one", "interrupted")
    )
    assert found.verdict.startswith("DIFFERS: not deterministic even without a resume: learning rate at update 1: ")
    assert not (tmp_path / "legs/resumed/updates_00000.jsonl").exists()


def call(config: Path, *words: object) -> tuple[int, str]:
    """The exit code of `llmtrain verify-resume`, and what it printed. Raises what the user would be told."""
    app = typer.Typer()
    app.command()(verify_resume)
    result = CliRunner().invoke(app, ["--config", str(config), *(str(word) for word in words)])
    if isinstance(result.exception, LlmtrainError):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def config(prepared: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(prepared))
    return path


def test_the_command_starts_real_processes(config: Path, tmp_path: Path) -> None:
    """The check would work for us and not where a user runs it."""
    words = ("--at", AT, "--steps", STEPS, "--keep", tmp_path / "kept", "--set", "run.dir=untouched")
    code, text = call(config, *words, "--json")
    found = json.loads(text)
    assert code == 0, text
    assert found["verified"] is True
    assert (found["at"], found["steps"], found["straight"]) == (AT, STEPS, {"engine": "single", "ranks": 1})
    assert (tmp_path / "kept/run_straight/checkpoints/step_00000002/manifest.json").exists()
    assert not Path("untouched").exists()


def test_the_table_and_the_exit_code_name_the_fault(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script would go on with a broken resume; a person could not see where it broke."""
    monkeypatch.setattr(module, "run_processes", breaking("a moment zeroed"))
    code, text = call(config, "--at", AT, "--steps", STEPS)
    assert code == 1
    assert text.splitlines()[-1].startswith("DIFFERS: moments as loaded at update 2: ")
    assert text.count("DIFFERS") >= 2
    for words in ("component", "first difference", "largest difference", "bound", "exact"):
        assert words in text


def test_a_leg_that_fails_shows_what_it_said(config: Path) -> None:
    """A user would be told that something failed, somewhere."""
    with pytest.raises(EnvironmentError) as refused:
        call(config, "--set", "model.vocab_size=340", "--set", "data.tokenizer.vocab_size=340")
    assert "the straight leg failed: exit code 2" in str(refused.value)
    assert "error: " in str(refused.value)
    assert "vocab_size" in str(refused.value)


def script(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script stand for Python."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_leg_that_hangs_or_loses_a_rank_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check meant to take minutes would stand for ever on a dead rank."""
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    leg = Leg("straight", [], 2, tmp_path, timeout_s=0.5)
    script(tmp_path / "python", "echo waiting; exec sleep 60", monkeypatch)
    with pytest.raises(EnvironmentError, match=r"(?s)straight leg failed: no rank got on for 0\.5 s; .*waiting"):
        run_processes(leg)
    script(tmp_path / "python", 'if [ "$RANK" = 1 ]; then echo gone; exit 3; fi; exec sleep 60', monkeypatch)
    with pytest.raises(EnvironmentError, match=r"(?s)exit code 3; rank_00001\.log ends with\ngone"):
        run_processes(leg._replace(timeout_s=60))


def test_what_cannot_be_verified_is_told_before_anything_starts(
    prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user would wait for processes to start, to be told of a typing error."""

    def never(leg: Leg) -> None:
        raise AssertionError(leg)

    def told(kind: type[LlmtrainError], engine: str = "single", count: int = 1, **words: Any) -> str:
        with pytest.raises(kind) as refused:
            verified(words.pop("config", prepared), tmp_path, Layout(engine, count), launch=never, **words)
        return str(refused.value)

    assert "--at 4 --steps 4" in told(ConfigError, at=4)
    assert "single runs on one rank" in told(ConfigError, "single", 2)
    assert "do not divide" in told(ConfigError, "fsdp", 3)
    elsewhere = {**prepared, "data": {**prepared["data"], "path": str(tmp_path / "none")}}
    assert "llmtrain prepare --config mine.yaml" in told(DataError, config=elsewhere)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not under a launcher" in told(EnvironmentError)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    assert "--keep" in told(EnvironmentError)
    (tmp_path / "legs/mine").mkdir(parents=True)
    assert "nothing is overwritten" in told(LlmtrainError)


@pytest.mark.parametrize(
    ("engine", "ranks", "wanted"),
    [
        (None, None, ("single", 1)),
        ("fsdp", None, ("fsdp", torch.cuda.device_count() or 2)),
        ("deepspeed", 3, ("zero2", 3)),
        ("zero3", 1, ("zero3", 1)),
    ],
)
def test_a_layout_is_the_configs_or_what_is_asked(
    prepared: dict[str, Any], engine: str | None, ranks: int | None, wanted: tuple[str, int]
) -> None:
    """A user would verify another engine than the one the run is to use."""
    config: Config = validate(prepared, "test")
    assert Layout.of(config, engine, ranks) == wanted
    with pytest.raises(ConfigError, match="engine zero4: choose one of"):
        Layout.of(config, "zero4", ranks)
