"""A run whose config changed is refused, or goes on exactly as its user said: with these learning rates, no others."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import apply_override, validate
from llmtrain.data.batches import TrainBatches
from llmtrain.data.dataset import open_data
from llmtrain.data.order import Consumed, Order, update_samples
from llmtrain.schedules import Schedule, extend, plan, replace
from llmtrain.train.metrics import read_metrics
from tests import ranks
from tests.test_resume import history, weights

ENGINES = {
    "single": (1, ("engine.kind=single",)),
    "fsdp": (2, ("engine.kind=fsdp",)),
    "zero2": (2, ("engine.kind=deepspeed", "engine.zero_stage=2")),
}
MODES = {"extend": extend, "replace": replace}
TOKENS = ("schedule.warmup=1024 tokens", "schedule.horizon=5120 tokens")  # the small config's 4 and 20 updates
CHANGES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {  # the trunk's words, the changed ones, the field
    "unchanged": ((), (), ""),
    "longer": ((), ("schedule.horizon=30 steps",), "schedule.horizon"),
    "shorter": ((), ("schedule.horizon=5 steps",), "schedule.horizon"),
    "peak": ((), ("schedule.peak=0.02",), "schedule.peak"),
    "floor": ((), ("schedule.floor=0.0",), "schedule.floor"),
    "warmup": ((), ("schedule.warmup=8 steps",), "schedule.warmup"),
    "shape": ((), ("schedule.name=linear",), "schedule.name"),
    "batch": (TOKENS, ("batch.global_sequences=16",), "schedule.tokens_per_update"),
}
AT = 6


class Runs:
    """Starts legs of runs below one folder, and keeps the trunks that the cases copy."""

    def __init__(self, folder: Path, prepared: dict[str, Any]) -> None:
        self.folder, self.prepared, self.legs = folder, prepared, 0
        self.path = folder / "config.yaml"
        self.path.write_text(yaml.safe_dump(prepared))

    def config(self, *words: str) -> Config:
        """The small config with overrides."""
        values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(self.prepared))
        for word in words:
            apply_override(values, word)
        return validate(values, "config")

    def schedule(self, *words: str) -> Schedule:
        """The schedule that the small config with overrides asks for."""
        config = self.config(*words)
        return plan(config.schedule, config.batch.tokens)

    def leg(self, run: Path, engine: str, stop: int, *words: str, change: str | None = None) -> tuple[int, str]:
        """Train `run` to update `stop` (0: to its horizon). Returns its exit code and what it printed."""
        self.legs += 1
        count, kind = ENGINES[engine]
        stop_at = (f"run.stop_at={stop} steps",) if stop else ()
        command = ["train", "--config", str(self.path)]
        for word in (f"run.dir={run}", *kind, *words, *stop_at):
            command += ["--set", word]
        command += ["--schedule-change", change] if change else []
        running = ranks.start(self.folder / "logs" / str(self.legs), count, main, command)
        codes = set(running.wait())
        assert len(codes) == 1, running.text()
        return codes.pop(), running.text()

    def must(self, run: Path, engine: str, stop: int, *words: str, change: str | None = None) -> str:
        """A leg that ends well; returns what it printed."""
        code, text = self.leg(run, engine, stop, *words, change=change)
        assert code == 0, text
        return text

    def trunk(self, engine: str, words: tuple[str, ...]) -> Path:
        """A run saved after update 6; only to be read."""
        run = self.folder / f"trunk_{engine}_{len(words)}"
        if not run.exists():
            self.must(run, engine, AT, *words)
        return run

    def copy(self, engine: str, words: tuple[str, ...], name: str) -> Path:
        """A run of its own, saved after update 6."""
        return Path(shutil.copytree(self.trunk(engine, words), self.folder / f"{name}_{self.legs}"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: dict[str, Any]) -> Runs:
    return Runs(tmp_path_factory.mktemp("contract"), prepared)


def lrs(run: Path) -> list[float]:
    """The LR column of metrics.jsonl; its rows are those of updates 1, 2, ... without a gap or repeat."""
    rows = [row for row in read_metrics(run) if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["lr"] for row in rows]


def digest(folder: Path) -> dict[str, str]:
    """Every file of a run, and the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state(run: Path, step: int) -> dict[str, Any]:
    """state.json of one checkpoint."""
    found: dict[str, Any] = json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_changed_schedule_is_refused_or_goes_on_as_told(runs: Runs, engine: str, change: str) -> None:
    """A changed config would bend the curve of a running experiment in silence, or use a stale first learning rate."""
    trunk, changed, field = CHANGES[change]
    saved, new = runs.schedule(*trunk), runs.schedule(*trunk, *changed)
    run = runs.copy(engine, trunk, f"{engine}_{change}")
    before = digest(run)
    if change != "unchanged":
        code, text = runs.leg(run, engine, 10, *trunk, *changed)
        assert code == 2 and "Traceback" not in text, text
        assert field in text and "checkpoint" in text and f"{saved.lr(AT):.6g}" in text
        assert f"{replace(saved, AT, new).lr(AT + 1):.6g}" in text
        assert "--schedule-change extend" in text and f"run.branch_from={run}@6" in text
        assert digest(run) == before
    for mode, joining in MODES.items():
        if (engine, change, mode) in (("fsdp", "unchanged", "extend"), ("zero2", "unchanged", "replace")):
            continue  # the flag is harmless: one of them on each of these engines is enough
        run = runs.copy(engine, trunk, f"{engine}_{change}_{mode}")
        if (change, mode) == ("shorter", "extend"):
            code, text = runs.leg(run, engine, 10, *trunk, *changed, change=mode)
            assert code == 2 and "write a longer one" in text and digest(run) == before
            continue
        text = runs.must(run, engine, 10, *trunk, *changed, change=mode)
        joined = joining(saved, AT, new)
        if change != "unchanged":
            assert f"{mode.upper()} after update 6" in text and field in text
            assert f"LR of update 6 was {saved.lr(6):.6e}, update 7 gets {joined.lr(7):.6e}" in text
        last = 10
        if engine == "single" or change == "longer":
            runs.must(run, engine, 12, *trunk, *changed)
            runs.must(run, engine, 14, *trunk, *changed)
            last = 14
        wanted = [saved.lr(k) for k in range(1, AT + 1)] + [joined.lr(k) for k in range(AT + 1, last + 1)]
        assert lrs(run) == wanted
        held = state(run, last)
        kept = Schedule.from_spec(held["schedule"])
        assert kept.hash == held["schedule_hash"] and [kept.lr(k) for k in range(AT + 1, 40)] == [
            joined.lr(k) for k in range(AT + 1, 40)
        ]
        final = [row for row in read_metrics(run) if row["kind"] == "validation"][-1]
        assert (final["schedule"], final["schedule_hash"]) == (new.name, kept.hash)


def test_a_batch_change_keeps_an_extended_curve_over_tokens(runs: Runs) -> None:
    """A run that was extended would lose its extension, or jump, when its global batch changes."""
    for name, peak in (("cosine", 0.01), ("constant", 0.005)):  # a constant is extended by a straight line
        words = (*TOKENS, f"schedule.name={name}", f"schedule.peak={peak}", "schedule.horizon=7680 tokens")
        run = runs.copy("single", TOKENS, f"extended_{name}")
        runs.must(run, "single", 8, *words, change="extend")
        runs.must(run, "single", 10, *words, "batch.global_sequences=16", change="extend")
        runs.must(run, "single", 12, *words, "batch.global_sequences=16")
        once = extend(runs.schedule(*TOKENS), AT, runs.schedule(*words))
        assert lrs(run)[:8] == [once.lr(k) for k in range(1, 9)]
        assert lrs(run)[8:] == pytest.approx([once.lr(8 + 2 * j) for j in range(1, 5)], rel=1e-14)


def test_a_change_that_leaves_nothing_to_train_is_refused(runs: Runs) -> None:
    """A user would be told FINISHED by a run that never made an update on the schedule asked for."""
    run = runs.copy("single", (), "ended")
    before = digest(run)
    code, text = runs.leg(run, "single", 0, "schedule.horizon=5 steps", change="replace")
    assert code == 2 and "nothing is left to train" in text and digest(run) == before


def test_an_unknown_mode_is_refused(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt mode would be taken for none, or for another."""
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(runs.path), "--schedule-change", "rescale"])
    assert ended.value.code == 2 and "choose extend or replace" in capsys.readouterr().err


def test_a_run_without_its_horizon_ends_where_the_joined_schedule_ends(runs: Runs) -> None:
    """A run that was made longer would end at its old last update, or a bigger batch would train on past the end."""
    run = runs.copy("single", (), "longer_to_its_end")
    runs.must(run, "single", 0, "schedule.horizon=16 steps", change="extend")
    assert len(lrs(run)) == 16 and read_metrics(run)[-1]["decayed"]
    run = runs.copy("single", TOKENS, "batch_to_its_end")
    runs.must(run, "single", 0, *TOKENS, "batch.global_sequences=16", change="replace")
    assert len(lrs(run)) == 13 and read_metrics(run)[-1]["tokens"] == 5120 and read_metrics(run)[-1]["decayed"]
    run = runs.copy("single", TOKENS, "stop_in_tokens")
    runs.must(run, "single", 0, *TOKENS, "batch.global_sequences=16", "run.stop_at=3000 tokens", change="replace")
    assert len(lrs(run)) == 9 and read_metrics(run)[-1]["tokens"] == 3072


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_changed_on_the_way_is_resumed_exactly(runs: Runs, engine: str) -> None:
    """A run with a new global batch would be another run after each restart, or count tokens it never saw."""
    words = (*TOKENS, "batch.global_sequences=16")
    straight, legs = runs.copy(engine, TOKENS, f"{engine}_straight"), runs.copy(engine, TOKENS, f"{engine}_legs")
    runs.must(straight, engine, 12, *words, change="replace")
    for stop in (8, 9, 12) if engine == "single" else (9, 12):
        text = runs.must(legs, engine, stop, *words, change="replace" if len(lrs(legs)) == AT else None)
    assert "REPLACE" not in text and "step=9 tokens=3072" in text
    assert history(legs) == history(straight) and weights(legs, 12) == weights(straight, 12)
    tokens = [256 * k for k in range(1, 7)] + [1536 + 512 * k for k in range(1, 7)]
    assert [row["tokens"] for row in read_metrics(legs) if row["kind"] == "step"] == tokens
    held = state(legs, 12)
    assert (held["tokens"], held["samples"]) == (4608, 144)
    assert held["trajectory"]["batch_segments"] == [[0, 0, 8], [6, 48, 16]]
    old = runs.schedule(*TOKENS)
    assert lrs(legs)[6:] == [old.lr(6 + 2 * j) for j in range(1, 7)]  # the same curve over tokens


def test_no_sample_is_repeated_or_skipped_where_the_batch_changes(
    runs: Runs, prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with a new global batch would train twice on some text and never on other."""
    seen: list[int] = []
    original = TrainBatches._read

    def spy(self: TrainBatches, ids: Any, rows: Any) -> Any:
        seen.extend(ids.tolist())
        return original(self, ids, rows)

    monkeypatch.setattr(TrainBatches, "_read", spy)
    run = runs.folder / "seen"
    for stop, sequences, change in ((3, 8, ()), (5, 16, ("--schedule-change", "replace")), (6, 16, ()), (7, 4, None)):
        command = ["train", "--config", str(runs.path), "--set", f"run.dir={run}"]
        for word in (*TOKENS, f"batch.global_sequences={sequences}", f"run.stop_at={stop} steps"):
            command += ["--set", word]
        with pytest.raises(SystemExit) as ended:
            main([*command, *(("--schedule-change", "extend") if change is None else change)])
        assert ended.value.code == 0
    data = open_data(prepared["data"]["path"])
    order = Order(data.num_samples(32), prepared["run"]["seed"], data.manifest.content_hash)
    assert seen == order.samples(0, 3 * 8 + 3 * 16 + 4).tolist()
    assert state(run, 7)["trajectory"]["batch_segments"] == [[0, 0, 8], [3, 24, 16], [6, 72, 4]]


def test_updates_after_a_place_in_the_data_take_the_samples_that_follow_it() -> None:
    """The bookkeeping above would be right in one run and wrong in the next."""
    order = Order(100, 1, "x")
    place = Consumed(6, 48)
    parts = [update_samples(order, k, 8) for k in range(1, 7)]
    parts += [update_samples(order, k, 16, place) for k in range(7, 12)]
    assert np.concatenate(parts).tolist() == order.samples(0, 48 + 80).tolist()
    assert place.through(6, 16) == 48 and place.through(11, 16) == 128


def test_a_batch_change_under_a_horizon_in_steps_must_be_replaced(runs: Runs) -> None:
    """A curve written in steps would silently stand for other tokens."""
    run = runs.copy("single", (), "batch_in_steps")
    before = digest(run)
    for change in (None, "extend"):
        code, text = runs.leg(run, "single", 8, "batch.global_sequences=16", change=change)
        assert code == 2 and "horizon is in steps" in text and "--schedule-change replace" in text, text
    assert "the global batch was 8 sequences, in this config it is 16" in text and digest(run) == before
    runs.must(run, "single", 8, "batch.global_sequences=16", change="replace")
    runs.must(run, "single", 10, "batch.global_sequences=16")
    assert lrs(run) == [runs.schedule().lr(k) for k in range(1, 11)]
    assert state(run, 10)["samples"] == 48 + 4 * 16
    words = (*TOKENS, "batch.global_sequences=16")  # from steps to tokens: it counts what was consumed
    runs.must(run, "single", 11, *words, change="replace")
    assert lrs(run)[-1] == runs.schedule(*TOKENS).lr(6 + 2 * 5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_branch_with_the_trunks_schedule_is_the_trunk(runs: Runs, engine: str) -> None:
    """A branch would differ from its trunk by more than its schedule, or touch the trunk it came from."""
    trunk = runs.trunk(engine, ())
    straight = runs.copy(engine, (), f"{engine}_going_on")
    runs.must(straight, engine, 10)
    before = digest(trunk)
    branch = runs.folder / f"{engine}_branch_same"
    text = runs.must(branch, engine, 8, f"run.branch_from={trunk}@6")
    assert "BRANCHED run=small step=6 tokens=1536" in text
    runs.must(branch, engine, 10, f"run.branch_from={trunk}@6")
    assert digest(trunk) == before
    assert history(branch) == history(straight)[6:] and weights(branch, 10) == weights(straight, 10)
    assert state(branch, 10)["schedule"] == state(straight, 10)["schedule"]


def test_a_branch_has_its_own_schedule_and_remembers_where_it_came_from(runs: Runs) -> None:
    """A cooldown from a trunk could not be told from a run of its own, or would need its trunk for ever."""
    trunk = runs.copy("single", (), "trunk_to_lose")
    branch = runs.folder / "cooldown"
    words = ("schedule.name=linear", "schedule.horizon=12 steps", "schedule.floor=0.0", f"run.branch_from={trunk}@6")
    text = runs.must(branch, "single", 9, *words)
    assert "BRANCH after update 6" in text
    first, *others = read_metrics(branch)
    assert (first["kind"], first["step"], first["schedule"]) == ("validation", 6, "linear")
    assert [row["step"] for row in others if row["kind"] == "step"] == [7, 8, 9]
    parent = state(trunk, 6)
    lineage = [{"run": str(trunk), "step": 6, **{k: parent[k] for k in ("schedule_hash", "trajectory_hash")}}]
    shutil.rmtree(trunk)
    runs.must(branch, "single", 0, *words)
    joined = replace(runs.schedule(), 6, runs.schedule(*words))
    rows = [row for row in read_metrics(branch) if row["kind"] == "step"]
    assert [row["lr"] for row in rows] == [joined.lr(k) for k in range(7, 13)]
    assert state(branch, 12)["lineage"] == lineage and state(branch, 12)["schedule"] == joined.spec
    code, text = runs.leg(branch, "single", 0, *words[:-1])
    assert code == 2 and "was branched from" in text and "put it back" in text
    second = runs.folder / "second"
    words = ("schedule.horizon=14 steps", f"run.branch_from={branch}@12")
    runs.must(second, "single", 0, *words)
    assert [parent["run"] for parent in state(second, 14)["lineage"]] == [str(trunk), str(branch)]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("run.branch_from=TRUNK",), "RUN_FOLDER@UPDATE"),
        (("run.branch_from=TRUNK@7",), "holds the checkpoints of updates 6"),
        (("run.branch_from=nowhere@6",), "nowhere is not a run folder"),
        (("run.branch_from=TRUNK@6", "optim.clip=0.5"), "optim.clip: there 1.0, in this config 0.5"),
        (("run.branch_from=TRUNK@6", "schedule.horizon=6 steps"), "nothing is left to train"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(runs: Runs, words: tuple[str, ...], wanted: str) -> None:
    """A mistyped branch would start from nothing, or from what it cannot be compared with."""
    trunk = runs.trunk("single", ())
    branch = runs.folder / f"refused_{runs.legs}"
    code, text = runs.leg(branch, "single", 0, *(word.replace("TRUNK", str(trunk)) for word in words))
    assert code == 2 and wanted in text and "Traceback" not in text, text
    assert not (branch / "metrics.jsonl").exists()
