"""A branch goes on from its trunk without a jump, is the run one would have trained, and costs what was promised."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import load_config, validate
from llmtrain.errors import ScheduleError
from llmtrain.schedules import Schedule, extend, plan, replace
from llmtrain.study import branch as branch_module
from llmtrain.study.branch import Branch, branch
from llmtrain.study.branch_cooldown import COOLDOWNS, Parent, section
from llmtrain.train.metrics import read_metrics
from tests.conftest import small_config
from tests.test_cli import call
from tests.test_resume import history, weights

Captured = pytest.CaptureFixture[str]
Call = Callable[..., tuple[int, str, str]]

BUDGETS = {5: 4, 10: 8, 20: 16, 40: 32}  # updates of a run, and those before its cooldown of 20 %
CLOCK = {"attempt", "step_time_s", "tokens_per_s", "mfu", "memory_gib"}
BATCH = 256  # tokens of the small config

TRUNKS: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant"},
    "constant, to 0": {"name": "constant", "floor": 0.0},
    "wsd, stable": {"name": "wsd", "horizon": "200 steps"},
    "wsd, decaying": {"name": "wsd", "horizon": "75 steps", "decay": "50%"},
    "cosine": {"name": "cosine"},
    "linear": {"name": "linear"},
    "tokens": {"name": "cosine", "warmup": "1500 tokens", "horizon": "25601 tokens"},
    "constant in tokens": {"name": "constant", "warmup": "1500 tokens", "horizon": "25601 tokens"},
    "as transformers counts": {"name": "constant", "convention": "hf"},
    "as DeepSpeed counts": {"name": "cosine", "convention": "deepspeed"},
    "a rounded warm-up": {"name": "constant", "warmup_shape": "cosine", "warmup_start": 0.1},
    "inverse_sqrt": {"name": "inverse_sqrt"},
    "infinite": {"name": "infinite", "cooldown": "30%", "level": 0.4},
    "one_cycle": {"name": "one_cycle", "warmup": 0},
    "restarting": {"name": "sgdr"},
    "no warm-up": {"name": "polynomial", "warmup": 0},
}
AT = 53


def small(schedule: dict[str, Any]) -> Config:
    """The small config on another schedule."""
    values = small_config(Path("data"), Path("text"))
    usual = {"peak": 0.01, "warmup": "6 steps", "horizon": "100 steps", "floor": 0.05}
    return validate({**values, "schedule": {**usual, **schedule}}, "config")


def parent_of(schedule: dict[str, Any], at: int = AT, before: Schedule | None = None) -> Parent:
    """A trunk that was trained on `schedule`, after update `at`."""
    config = small(schedule)
    before = before or plan(config.schedule, config.batch.tokens)
    return Parent("runs/trunk", at, config, before, config.batch.sequences, None, 1)


def cooled(parent: Parent, written: str, *overrides: str) -> Branch:
    return branch(parent, section(parent, written), "cool", Path("runs/cool"), overrides)


def own(found: Branch) -> Schedule:
    """The schedule of a branch's config by itself."""
    return plan(found.config.schedule, found.config.batch.tokens)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_cooldown_starts_at_the_rate_reached_whatever_the_trunk(trunk: str) -> None:
    """The loss of a branch would jump with its learning rate, and be taken for what its shape gives."""
    parent = parent_of(TRUNKS[trunk])
    reached = parent.before.lr(AT)
    shapes = [shape for shape in COOLDOWNS if parent.config.schedule.floor or shape not in ("exponential", "harmonic")]
    for shape in (*shapes, "polynomial:power=3", "cosine:theta=2", "half_cosine"):
        for length, last in (("20%", 67), ("12 steps", AT + 12), ("2561 tokens", AT + 11)):
            found = cooled(parent, f"cooldown({shape}, {length})")
            lrs = [found.schedule.lr(k) for k in range(AT, found.last + 1)]
            if ":" in shape or shape == "half_cosine":
                assert own(found).lr(AT) == pytest.approx(reached, rel=1e-14)
            else:
                assert own(found).lr(AT) == reached
            assert found.last == last
            assert [found.schedule.lr(k) for k in (1, 20, AT)] == [parent.before.lr(k) for k in (1, 20, AT)]
            assert np.all(np.diff(lrs) < 1e-18) and lrs[-1] < lrs[0] == reached
            floor = parent.before.peak * parent.config.schedule.floor
            lagging = "convention" in found.config.schedule.shape  # the floor comes an update after the end
            assert found.schedule.lr(found.last + lagging) == pytest.approx(floor, abs=1e-18)


def test_a_cooldown_after_an_extension_from_a_higher_peak_starts_where_that_is() -> None:
    """The rate would drop to the new peak at once."""
    old, new = parent_of({"name": "constant", "peak": 0.03}), parent_of({"name": "linear"})
    joined = extend(old.before, 40, new.before)
    found = cooled(parent_of({"name": "linear"}, AT, joined), "cooldown(linear, 20%)")
    assert joined.lr(AT) > joined.peak
    assert own(found).lr(AT) == joined.lr(AT) == found.schedule.lr(AT)
    assert found.schedule.lr(found.last) == pytest.approx(0.01 * 0.05, rel=1e-14)


def test_from_a_stable_trunk_a_cooldown_is_the_wsd_schedule() -> None:
    """A branch could not stand for the run that one would have trained on that budget."""
    for unit, one in (("steps", 1), ("tokens", BATCH)):
        for horizon in range(40, 60):
            words = {"warmup": f"{6 * one} {unit}", "horizon": f"{horizon * one} {unit}"}
            wanted = plan(small({"name": "wsd", "decay": "20%", "cooldown": "1-sqrt", **words}).schedule, BATCH)
            start = max(k for k in range(horizon) if wanted(k) == 1)
            trunk = parent_of({"name": "constant", **words, "horizon": f"{90 * one} {unit}"}, start)
            found = cooled(trunk, "cooldown(1-sqrt, 20%)")
            ks = np.arange(1, 60)
            if unit == "steps" and found.last == horizon:
                assert own(found).spec == wanted.spec
            further = cooled(trunk, f"cooldown(1-sqrt, {horizon - start} steps)")
            if unit == "steps":
                assert np.array_equal(further.schedule.multipliers(ks), wanted.multipliers(ks))
            assert further.last == horizon


def test_any_schedule_can_be_branched_to() -> None:
    """A user who wants more than a cooldown would be on their own again."""
    parent = parent_of({"name": "cosine", "theta": 2.0})
    found = cooled(parent, "linear:horizon=80 steps:floor=0")
    assert found.schedule == replace(
        parent.before, AT, plan(small({"name": "linear", "horizon": "80 steps", "floor": 0.0}).schedule, BATCH)
    )
    assert cooled(parent, "cosine").schedule == parent.before
    floored = cooled(parent, "cooldown(linear, 20%)", "schedule.floor=0.0", "validation.every=3 steps")
    assert floored.schedule.lr(floored.last) == 0
    assert floored.config.validation.every is not None


def test_a_branch_keeps_out_of_the_trunks_store_and_has_its_batch() -> None:
    """A branch would write its checkpoints among the trunk's, or count updates of another size."""
    parent = parent_of({"name": "constant"})
    values = parent.config.model_dump(mode="json")
    values["checkpoint"] |= {"dir": "s3://bucket/runs/trunk", "keep_every": "5 steps"}
    values["run"] |= {"stop_at": "60 steps"}
    found = cooled(parent._replace(config=validate(values, "config"), batch=4), "cooldown(linear, 20%)")
    assert found.config.checkpoint.dir == "s3://bucket/runs/cool"
    assert found.config.checkpoint.keep_every is None
    assert (found.config.run.stop_at, found.config.run.branch_from) == (None, "runs/trunk@53")
    assert found.config.batch.sequences == 4


@pytest.mark.parametrize(
    ("trunk", "at", "written", "wanted"),
    [
        ({"name": "constant"}, 3, "cooldown(linear, 20%)", "inside its warm-up of 6 updates"),
        ({"name": "linear", "floor": 0.0}, 100, "cooldown(linear, 20%)", "is 0 after update 100"),
        ({"name": "constant"}, AT, "cooldown(linaer, 20%)", 'unknown shape "linaer"; did you mean "linear"'),
        ({"name": "constant"}, AT, "cooldown(constant, 20%)", 'unknown shape "constant"'),
        ({"name": "constant"}, AT, "cooldown(square:power=2, 20%)", "square takes no parameters"),
        ({"name": "constant"}, AT, "cooldown(polynomial:pwer=2, 20%)", 'no parameter "pwer"; did you mean "power"'),
        ({"name": "constant", "floor": 0.0}, AT, "cooldown(harmonic, 20%)", "needs a floor above 0"),
        ({"name": "constant"}, AT, "cooldown(linear)", "write cooldown(SHAPE, 20%)"),
        ({"name": "constant"}, AT, "cooldown(linear, 20)", "has no unit"),
        ({"name": "constant"}, AT, "cooldown(linear, 100%)", "wanted some updates of the run"),
        ({"name": "constant"}, AT, "cooldown(linear, 0 steps)", "wanted some updates of the run"),
        ({"name": "constant"}, AT, "cooldown(linear, auto)", "wanted some updates of the run"),
        ({"name": "constant"}, AT, "cosin", 'unknown schedule "cosin"; did you mean "cosine"'),
        ({"name": "constant"}, AT, "linear:horizon=50 steps", "write a longer schedule.horizon"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(trunk: dict[str, Any], at: int, written: str, wanted: str) -> None:
    """A mistake in the schedule would be found after the trunk's days of training were used for it."""
    with pytest.raises(ScheduleError) as refused:
        cooled(parent_of(trunk, at), written)
    assert wanted in str(refused.value)


class Here:
    """Stands for the process of a training, which has run in this one."""

    def wait(self, timeout: float) -> int:
        return 0


def train_in_this_process(config: Path, threads: int, log: Path) -> Here:
    from llmtrain.train.run import train

    train(load_config(config), prepare_command="llmtrain prepare")
    return Here()


def listed(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: when it was changed, and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def rows(run: Path, first: int, last: int, but: set[str]) -> list[dict[str, Any]]:
    """The rows of updates first..last and of the validation after the last, without some fields."""
    return [
        {key: value for key, value in row.items() if key not in but}
        for row in read_metrics(run)
        if first <= row["step"] <= last and (row["kind"] == "step" or row["step"] == last)
    ]


def state(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    return found


def config_file(prepared: dict[str, Any], run: Path, schedule: dict[str, Any], **sections: Any) -> Path:
    path = run.with_name(f"{run.name}.yaml")
    values = {**prepared, "run": {"name": run.name, "dir": str(run), "seed": 7}}
    values |= {"schedule": {"peak": 0.01, "warmup": "4 steps", "floor": 0.1, **schedule}, **sections}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trunk(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A constant run of 32 updates, which keeps every fourth; only to be read."""
    run = tmp_path_factory.mktemp("branch") / "trunk"
    keeps = {"every": "4 steps", "keep_every": "4 steps"}
    looks = {"max_tokens": 200, "every": "16 steps"}
    config = config_file(prepared, run, {"name": "constant", "horizon": "32 steps"}, checkpoint=keeps, validation=looks)
    train_in_this_process(config, 1, run)
    return run


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """--train trains in this process. The configs it was asked to train."""
    asked: list[Path] = []

    def start(config: Path, threads: int, log: Path) -> Here:
        asked.append(config)
        return train_in_this_process(config, threads, log)

    monkeypatch.setattr(branch_module, "start_training", start)
    return asked


def test_four_budgets_cost_what_was_promised_and_are_the_runs_of_their_own(
    trunk: Path, prepared: dict[str, Any], tmp_path: Path, capsys: Captured, in_process: list[Path]
) -> None:
    """Budgets from one trunk would be other models than their own runs, cost more than was said, or spoil the trunk."""
    before = listed(trunk)
    budgets = ",".join(f"{updates} steps" for updates in BUDGETS)
    words = ("branch", str(trunk), "--budgets", budgets, "--cooldown", "20%", "--dir", str(tmp_path))
    code, out, _ = call(capsys, *words, "--train")
    assert code == 0
    assert "planned: 32 updates of the trunk and 15 of branches, against 75 of separate runs: 37.3% saved" in out
    assert "made: 32 updates of the trunk and 15 of branches, against 75 of separate runs: 37.3% saved" in out
    assert listed(trunk) == before

    branches = {updates: tmp_path / f"trunk_{updates}-steps_linear" for updates in BUDGETS}
    made = {run: len(history(run)) for run in (trunk, *branches.values())}
    spent = sum(made.values()) / max(BUDGETS)
    separate = sum(BUDGETS) / max(BUDGETS)
    assert (spent, separate) == (pytest.approx(1.175), 1.875)
    assert round(1 - spent / separate, 2) == 0.37

    for updates in (10, 20):
        straight = tmp_path / f"straight_{updates}"
        schedule = {"name": "wsd", "decay": "20%", "horizon": f"{updates} steps"}
        train_in_this_process(config_file(prepared, straight, schedule), 1, straight)
        run, start = branches[updates], BUDGETS[updates]
        assert weights(run, updates) == weights(straight, updates)
        assert history(run) == history(straight)[start:]
        but = {*CLOCK, "schedule_hash"}
        assert rows(run, start + 1, updates, but) == rows(straight, start + 1, updates, but)
        assert rows(run, updates, updates, but)[-1]["decayed"]
        assert state(run, updates)["trajectory"] == state(straight, updates)["trajectory"]
        assert [parent["step"] for parent in state(run, updates)["lineage"]] == [start]

    trained, files = len(in_process), {run: listed(run) for run in branches.values()}
    code, out, _ = call(capsys, *words, "--train")
    assert (code, out.count("is there already"), len(in_process)) == (0, 4, trained)
    assert {run: listed(run) for run in branches.values()} == files


def test_a_branch_on_the_trunks_own_schedule_is_the_trunk(
    trunk: Path, tmp_path: Path, capsys: Captured, in_process: list[Path]
) -> None:
    """A difference between a branch and its trunk could be of the branching, not of the schedule."""
    run = tmp_path / "same"
    asked = ("--schedule", "constant", "--name", "same", "--dir", str(run), "--set", "run.stop_at=16 steps")
    assert call(capsys, "branch", f"{trunk}@8", *asked, "--train")[0] == 0
    assert weights(run, 16) == weights(trunk, 16)
    assert rows(run, 9, 16, CLOCK) == rows(trunk, 9, 16, CLOCK)
    ours, theirs = state(run, 16), state(trunk, 16)
    assert {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)} == {"lineage", "metrics_offset"}
    assert read_metrics(run)[0]["step"] == 8


def test_two_shapes_from_one_trunk(trunk: Path, tmp_path: Path, capsys: Captured, in_process: list[Path]) -> None:
    """Cooldown shapes would be compared from different weights, or pay for the trunk once each."""
    words = ("branch", str(trunk), "--budgets", "20 steps", "--shapes", "linear,1-sqrt", "--dir", str(tmp_path))
    code, out, _ = call(capsys, *words, "--train", "--json")
    found = json.loads(out.splitlines()[-1])  # training in this process printed too
    assert code == 0
    assert found["planned"] == found["made"] == {"trunk": 16, "branches": 8, "separate": 40, "saved": 0.4}
    lrs = [[row["lr"] for row in read_metrics(Path(one["run"])) if row["kind"] == "step"] for one in found["branches"]]
    shares = [np.arange(1, 5) / 4, np.sqrt(np.arange(1, 5) / 4)]
    for used, share in zip(lrs, shares, strict=True):
        assert used == pytest.approx((0.01 * (0.1 + 0.9 * (1 - share))).tolist(), rel=1e-12)
    assert len({one["result"]["loss"] for one in found["branches"]}) == 2


def test_one_branch_says_both_rates_and_how_to_start_it(trunk: Path, tmp_path: Path, capsys: Captured) -> None:
    """A user would start the wrong config, or see a jump of the rate only in the curve of the loss."""
    run = tmp_path / "cool"
    words = ("branch", f"{trunk}@16", "--schedule", "cooldown(linear, 20%)", "--name", "cool", "--dir", str(run))
    code, out, _ = call(capsys, *words, "--dry-run")
    assert code == 0 and not run.exists()
    code, out, _ = call(capsys, *words)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[2:4]] == [["16", "1.000000e-02"], ["17", "7.750000e-03"]]
    assert f"llmtrain train --config {run / 'config.yaml'}" in out
    config = load_config(run / "config.yaml")
    assert (config.run.name, config.run.branch_from, config.run.seed) == ("cool", f"{trunk}@16", 7)
    found = json.loads(call(capsys, *words, "--json")[1])
    assert found["lr"] == pytest.approx({"reached": 0.01, "next": 0.00775, "trunk_next": 0.01, "last": 0.001})

    code, _, err = call(capsys, *words[:3], "cooldown(square, 20%)", *words[4:])
    assert code == 2 and "is another run, it differs in schedule.cooldown" in err
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    code, _, err = call(capsys, *words[:-1], str(tmp_path / "notes"))
    assert code == 2 and "is there already, and is no run" in err


def test_ranks_of_the_trunk_are_those_of_the_command(trunk: Path) -> None:
    """The command would start a run for eight GPUs on one."""
    parent = parent_of({"name": "constant"})._replace(ranks=8)
    for kind, command in (("fsdp", "torchrun --nproc-per-node 8"), ("deepspeed", "deepspeed --num_gpus 8")):
        found = cooled(parent, "cooldown(linear, 20%)", f"engine.kind={kind}")
        assert found.commands == [f"{command} launch/pretrain.py --config runs/cool/config.yaml"]


def test_a_plan_says_what_a_trunk_must_keep_before_it_is_trained(
    prepared: dict[str, Any], tmp_path: Path, capsys: Captured
) -> None:
    """The trunk would be trained for days, and then lack the checkpoint that a budget starts from."""
    path = config_file(prepared, tmp_path / "later", {"name": "constant", "horizon": "64 steps"})
    words = ("branch", str(path), "--dry-run", "--budgets")
    code, out, _ = call(capsys, *words, "10 steps,20 steps,80 steps")
    assert code == 0 and not (tmp_path / "later").exists()
    assert "no checkpoint of updates 8, 16, 64 (it has: none so far)" in out
    assert '--set "checkpoint.every=8 steps" --set "checkpoint.keep_every=8 steps"' in out
    assert "It ends with" not in out

    keeps = {"every": "8 steps", "keep_every": "8 steps"}
    config_file(prepared, tmp_path / "later", {"name": "constant", "horizon": "64 steps"}, checkpoint=keeps)
    assert "By its config it will have them" in call(capsys, *words, "10 steps,20 steps,80 steps")[1]

    code, out, _ = call(capsys, *words, "239 steps,477 steps,0.245M")  # 191, 381 and 766 updates of 256 tokens
    assert "It ends with update 64: train it to update 766 at least" in out
    assert "Budgets of 239 steps, 478 steps, 955 steps need a trunk with" in out
    assert "checkpoint.keep_every=191 steps" in out
    again = json.loads(call(capsys, *words, "239 steps,478 steps,955 steps", "--json")[1])
    assert again["updates"] == again["missing"] == [191, 382, 764]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("TRUNK@17",), "no checkpoint of update 17; the nearest are 8, 12, 16, 20, 24, 28"),
        (("TRUNK",), "write RUN@UPDATE; it has checkpoints of updates 4, 8, 12"),
        (("nowhere@16",), "nowhere is not a run folder"),
        (("TRUNK@16", "--set", "optim.clip=0.5"), "optim.clip: there 1.0, in the branch 0.5"),
        (("TRUNK@16", "--set", "batch.global_sequences=16"), "batch.sequences: there 8, in the branch 16"),
        (("TRUNK@16", "--set", "run.seed=8"), "seed: there 7, in the branch 8"),
        (("TRUNK@16", "--set", "schedule.horizn=9"), "horizn"),
        (("TRUNK@16", "--name", "a b"), "run.name"),
        (("TRUNK@16", "--budgets", "20 steps"), "write --schedule for one branch"),
        (("TRUNK@16", "--train", "--dry-run"), "leave out --train"),
        (("TRUNK", "--schedule", "", "--budgets", "90 steps,95 steps"), "no checkpoint of updates 72, 76"),
        (("TRUNK", "--schedule", "", "--budgets", "4 steps"), "start after update 3, and the warm-up of"),
        (("TRUNK", "--schedule", "", "--budgets", "20%"), "wanted tokens or updates"),
        (("TRUNK", "--schedule", "", "--budgets", "many"), "--budgets many"),
        (("TRUNK", "--schedule", "", "--budgets", ","), "--budgets"),
        (("TRUNK", "--schedule", "", "--budgets", "20 steps", "--shapes", "sqrt"), 'unknown shape "sqrt"'),
        (("TRUNK", "--schedule", "", "--budgets", "20 steps", "--cooldown", "0.2"), "has no unit"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(
    trunk: Path, tmp_path: Path, capsys: Captured, words: tuple[str, ...], wanted: str
) -> None:
    """A mistyped branch would start from nothing, from another experiment, or not at all, a queue later."""
    before = listed(trunk)
    options = {"--schedule": "cooldown(linear, 20%)", "--name": "cool", "--dir": str(tmp_path / "cool")}
    run, *given = [word.replace("TRUNK", str(trunk)) for word in words]
    asked = [part for name, text in options.items() if name not in given for part in (name, text)]
    if "" in given:
        given = given[2:]
    code, out, err = call(capsys, "branch", run, *given, *asked)
    assert code == 2 and wanted in " ".join(err.replace("│", " ").split()), err
    assert "Traceback" not in out + err
    assert not (tmp_path / "cool").exists()
    assert listed(trunk) == before


def test_a_training_that_fails_is_told_with_its_log(
    trunk: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed branch would look like one that is still to be trained."""

    class Failed(Here):
        def wait(self, timeout: float) -> int:
            return 2

    def start(config: Path, threads: int, log: Path) -> Failed:
        log.write_text("first\nerror: the disk is full\n")
        return Failed()

    monkeypatch.setattr(branch_module, "start_training", start)
    words = ("--schedule", "cooldown(linear, 20%)", "--name", "cool", "--dir", str(tmp_path / "cool"), "--train")
    code, _, err = call(capsys, "branch", f"{trunk}@16", *words)
    assert code == 2 and "ended with exit code 2" in err and "the disk is full" in err
    assert (tmp_path / "cool" / "config.yaml").is_file()


def test_a_stop_reaches_the_training_which_saves(
    trunk: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or the end of a job would lose what a branch had learnt, or leave it running behind."""
    told = []

    class Slow(Here):
        def wait(self, timeout: float) -> int:
            if told:
                return 0
            os.kill(os.getpid(), signal.SIGTERM)
            raise subprocess.TimeoutExpired("train", timeout)

        def terminate(self) -> None:
            told.append(signal.SIGTERM)

    monkeypatch.setattr(branch_module, "start_training", lambda config, threads, log: Slow())
    before = signal.getsignal(signal.SIGTERM)
    words = ("branch", str(trunk), "--budgets", "10 steps,20 steps", "--dir", str(tmp_path), "--train")
    code, _, err = call(capsys, *words)
    assert (code, told) == (0, [signal.SIGTERM])
    assert "STOPPED (signal SIGTERM): the same command goes on from here" in err
    assert err.count("training ") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_of_the_readme_for_a_branch_runs(trunk: Path, prepared: dict[str, Any], tmp_path: Path) -> None:
    """A newcomer's first branch would end in an error."""
    config = config_file(prepared, tmp_path / "base", {"name": "constant", "horizon": "32 steps"})
    run = tmp_path / "cooldown"
    sets = [f"run.branch_from={trunk}@28", f"run.dir={run}", "schedule.name=linear", "schedule.floor=0"]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(config), *(word for text in sets for word in ("--set", text))])
    assert ended.value.code == 0
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "step"] == list(range(29, 33))
