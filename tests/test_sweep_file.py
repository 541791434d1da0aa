"""Does a study file name exactly the runs that were meant, and is one that cannot be run refused before any runs?"""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from rich.console import Console

from llmtrain.cli import main
from llmtrain.config_file import load_config
from llmtrain.errors import CheckpointError, ConfigError, EnvironmentError
from llmtrain.schedules import plan
from llmtrain.study.compare import compare
from llmtrain.study.launch import gpus, start_training
from llmtrain.study.report import markdown
from llmtrain.study.report_data import as_json
from llmtrain.study.sweep import Job, sweep
from llmtrain.study.sweep_file import Planned, plan_study
from llmtrain.study.sweep_shown import SweepShown
from llmtrain.study.sweep_state import Rows, check_study, hold_study, state_of, write_study
from tests.compare_runs import write_run
from tests.conftest import small_config

REPO = Path(__file__).parent.parent
STUDIES = sorted((REPO / "configs" / "studies").glob("*.yaml"))
MakeStudy = Callable[..., Path]


@pytest.fixture
def study(tmp_path: Path) -> MakeStudy:
    """Write a base config, without data, and a study file with this grid."""

    def write(grid: dict[str, Any], **more: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(small_config(tmp_path / "data", tmp_path / "text")))
        path = tmp_path / "study.yaml"
        values = {"name": "s", "base": "base.yaml", "dir": str(tmp_path / "s"), "grid": grid, **more}
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


def names(planned: Planned) -> list[str]:
    return [run.name for run in planned.runs]


def test_the_grid_is_every_combination_and_its_names_do_not_move(study: MakeStudy) -> None:
    """A cell would be missing, or a grid that grew would train everything again under other names."""
    grid = {"schedules": [{"name": "cosine"}, {"name": "wsd", "decay": "10%"}], "warmups": ["4 steps", "0 steps"]}
    planned = plan_study(study({**grid, "peaks": [0.01, 0.02], "seeds": [1]}))
    assert names(planned) == [
        *("cosine-w4-p0.01-s1", "cosine-w4-p0.02-s1", "cosine-w0-p0.01-s1", "cosine-w0-p0.02-s1"),
        *("wsd-decay_10pct-w4-p0.01-s1", "wsd-decay_10pct-w4-p0.02-s1"),
        *("wsd-decay_10pct-w0-p0.01-s1", "wsd-decay_10pct-w0-p0.02-s1"),
    ]
    run = planned.runs[5]
    assert (run.index, run.cell, run.updates, run.tokens) == (6, "wsd-decay_10pct-w4", 20, 20 * 8 * 32)
    config = run.config
    assert (config.run.name, config.run.seed, Path(config.run.dir).name) == (run.name, 1, run.name)
    assert (config.schedule.peak, config.schedule.floor, config.schedule.shape) == (0.02, 0.1, {"decay": "10%"})
    assert (str(config.schedule.warmup), str(planned.runs[7].config.schedule.warmup)) == ("4 steps", "0 steps")
    assert run.schedule == plan(config.schedule, config.batch.tokens, config.optim.betas[1])
    grown = plan_study(study({**grid, "peaks": [0.01, 0.02, 0.04], "seeds": [1, 2]}))
    assert set(names(planned)) < set(names(grown)) and len(grown.runs) == 24


def test_what_the_grid_leaves_out_is_as_in_the_base(study: MakeStudy) -> None:
    """A study would compare other runs than its author thinks of."""
    (only,) = plan_study(study({})).runs
    assert only.name == "cosine-w4-p0.01-s7" and only.config.schedule.floor == 0.1
    changed = study({}, set={"schedule": {"name": "wsd", "decay": "10%"}, "checkpoint": {"dir": "memory://kept"}})
    (only,) = plan_study(changed).runs
    assert (only.name, only.config.schedule.shape) == ("wsd-w4-p0.01-s7", {"decay": "10%"})
    assert only.config.checkpoint.dir == "memory://kept/wsd-w4-p0.01-s7"  # of its own, not shared by all runs
    other = study({"schedules": [{"name": "linear", "peak": 0.02, "warmup": "1%"}]}, set={"schedule": {"name": "wsd"}})
    (only,) = plan_study(other).runs
    assert (only.name, only.config.schedule.shape) == ("linear-w1pct-p0.02-s7", {})


def test_automatic_peaks_are_centred_by_the_bound_and_shared(study: MakeStudy) -> None:
    """The sweep of one shape would miss its best peak, or no two schedules would have a peak in common."""
    shapes = [{"name": "linear", "floor": 0}, {"name": "wsd", "floor": 0}, {"name": "constant"}]
    reference = {"name": "linear", "floor": 0, "peak": 0.008}
    grid = {"schedules": shapes, "peaks": {"points": 3, "reference": reference}}
    runs = plan_study(study(grid, set={"schedule": {"horizon": "4000 steps", "warmup": "0 steps"}})).runs
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run.schedule.name, []).append(run.schedule.peak)
    assert found == {"linear": [0.004, 0.008, 0.016], "wsd": [0.002, 0.004, 0.008], "constant": [0.001, 0.002, 0.004]}
    assert [run.schedule.peak for run in plan_study(study({"peaks": "auto"})).runs] == [0.0025, 0.005, 0.01, 0.02, 0.04]


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"shedules": [{}]}, {}, r'unknown key "grid.shedules"; did you mean "schedules"\?'),
    ({"seeds": []}, {}, r"grid.seeds: .*at least 1 item"),
    ({"seeds": [1, "two"]}, {}, r"grid.seeds.1: .*valid integer.*'two'"),
    ({"warmups": [3]}, {}, r'grid.warmups.0: 3 has no unit: write "3 steps"'),
    ({"peaks": 3e-4}, {}, r"grid.peaks: 0.0003 is no choice of peaks: write \["),
    ({"peaks": [0.01, -1]}, {}, r"grid.peaks.1: .*greater than 0"),
    ({"peaks": {"pionts": 3}}, {}, r'unknown key "grid.peaks.pionts"; did you mean "points"\?'),
    ({"peaks": {"points": 2}}, {}, r"grid.peaks.points: .*greater than or equal to 3"),
    ({}, {"at_once": 0}, r"at_once: .*greater than 0"),
    ({}, {"name": "a b"}, r"name: .*pattern"),
    ({}, {"base": None}, r"base is missing"),
    ({}, {"base": "bse.yaml"}, r'cannot read base config .*bse.yaml: No such file .*did you mean "base.yaml"'),
    ({}, {"baseline": "linear-w4"}, r'baseline "linear-w4" is no cell of it; '),
    ({}, {"set": {"optim": {"clipp": 1}}}, r'with `set`:\n  unknown key "optim.clipp"; did you mean "clip"\?'),
    (
        {"schedules": [{"name": "cosin"}]},
        {},
        r'unknown schedule "cosin"; did you mean "cosine"\?.* \(cosin-w4-p0.01-s7\)',
    ),
    ({"schedules": [{"name": "wsd", "decya": "1%"}]}, {}, r'wsd has no parameter "decya"; did you mean "decay"\?'),
    ({"schedules": [{"peak": 0.1}], "peaks": [0.2]}, {}, r"has a peak of its own; leave it out, or grid.peaks"),
    ({"schedules": [{"warmup": "1%"}], "warmups": ["2%"]}, {}, r"has a warmup of its own; leave it out, or grid.warm"),
    ({"schedules": [{}, {"floor": 0.1}]}, {}, r"cosine-w4-p0.01-s7 and cosine-floor_0.1-w4-p0.01-s7 are one training"),
    ({"seeds": [1, 1]}, {}, r"are one training: leave one out of the grid"),
    ({"peaks": [0.01, 0.0100000001]}, {}, r'two runs would be called "cosine-w4-p0.01-s7"'),
]


@pytest.mark.parametrize(("grid", "more", "said"), BAD, ids=[said[:40] for _, _, said in BAD])
def test_a_study_that_cannot_run_is_refused(study: MakeStudy, grid: dict[str, Any], more: Any, said: str) -> None:
    """The mistake would show after hours, in one run of many, or as a traceback."""
    with pytest.raises(ConfigError, match=said):
        plan_study(study(grid, **more))


def test_all_faults_are_told_at_once_with_the_runs_that_have_them(study: MakeStudy) -> None:
    """A study would be mended one message at a time."""
    path = study({"warmups": ["4 steps", "50 steps"], "schedules": [{}, {"name": "exponential", "floor": 0}]})
    with pytest.raises(ConfigError) as error:
        plan_study(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("(cosine-w50-p0.01-s7, exponential-floor_0-w50-p0.01-s7)") and '"50 steps"' in lines[1]
    assert lines[2].endswith("(exponential-floor_0-w4-p0.01-s7)") and "floor above 0" in lines[2]
    with pytest.raises(ConfigError, match="must be a mapping with name, base"):
        path.write_text("- 1\n")
        plan_study(path)
    with pytest.raises(ConfigError, match=r'cannot read study .*study.yml: No such file .*did you mean "study.yaml"'):
        plan_study(path.with_name("study.yml"))


def test_data_and_room_are_checked_before_anything_runs(
    study: MakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run would fail on a compute node, or the tenth on a full disk."""
    path = study({}, set={"data": {"path": "nowhere"}})
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "there is no prepared data" in said
    assert f"llmtrain prepare --config {path.parent / 'base.yaml'} --set data.path=nowhere" in said
    assert list((path.parent / "s").iterdir()) == [path.parent / "s" / "lock"]
    planned = plan_study(study({"seeds": [1, 2]}))
    monkeypatch.setattr("llmtrain.study.sweep_state.open_data", MagicMock())
    check_study(planned, ["new", "new"], 1)
    monkeypatch.setattr("llmtrain.study.sweep_state._BYTES_PER_PARAMETER", 10**13)
    with pytest.raises(EnvironmentError, match=r"GB free, the checkpoints of 1 runs need .* lower checkpoint.keep"):
        check_study(planned, ["finished", "new"], 1)


def test_two_sweeps_of_a_study_do_not_meet(tmp_path: Path) -> None:
    """Both would start the same run, and half of each would fail; elements of an array must not hinder each other."""

    def refused(shared: bool) -> None:
        with pytest.raises(CheckpointError, match="is being swept: another"), hold_study(tmp_path, shared=shared):
            pass

    with hold_study(tmp_path, shared=True), hold_study(tmp_path, shared=True):
        refused(shared=False)
    with hold_study(tmp_path, shared=False):
        refused(shared=True)
        refused(shared=False)


class Counted:
    """A training that ends after a few looks, and counts how many there are."""

    running: set[int] = set()
    most = 0

    def __init__(self, slot: int) -> None:
        assert slot not in Counted.running
        Counted.running.add(slot)
        Counted.most = max(Counted.most, len(Counted.running))
        self.slot, self.looks = slot, 0

    def poll(self) -> int | None:
        self.looks += 1
        if self.looks < 2 + self.slot:
            return None
        Counted.running.discard(self.slot)
        return 0

    def terminate(self) -> None:
        raise AssertionError("nothing asked it to end")


class Silent:
    """Shows nothing."""

    def begun(self, job: Any) -> None: ...
    def ended(self, job: Any) -> None: ...
    def look(self, jobs: Any) -> None: ...


def test_no_more_than_asked_for_train_at_once_each_in_a_place_of_its_own(
    study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine would be overrun, or two trainings put on one GPU while another idles."""
    monkeypatch.setattr("llmtrain.study.sweep._POLL_S", 0)
    planned = plan_study(study({"seeds": list(range(7))}))
    jobs, signal = sweep(planned.runs, 3, lambda config, log, slot: Counted(slot), Silent())
    assert (Counted.most, signal, {job.stage for job in jobs}) == (3, "", {"stopped"})
    assert all(load_config(run.folder / "config.yaml") == run.config for run in planned.runs)


def test_a_training_has_its_share_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training would take all cores and the first GPU, or start afresh the log of the attempt before."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8f")
    assert gpus() == ["2", "GPU-8f"]
    door, log = tmp_path / "python", tmp_path / "run" / "train.log"
    door.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES, $OMP_NUM_THREADS threads: $@"\nexit 3\n')
    door.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(door))
    assert start_training(tmp_path / "a.yaml", 3, log, gpu="GPU-8f").wait() == 3
    assert start_training(tmp_path / "a.yaml", 1, log).wait() == 3
    words = f"-m llmtrain train --config {tmp_path / 'a.yaml'}"
    assert log.read_text() == f"GPU-8f, 3 threads: {words}\n2,GPU-8f, 1 threads: {words}\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


def test_a_terminal_shows_every_run_and_how_long_it_takes(study: MakeStudy) -> None:
    """Whoever waits for a study could not tell whether to go to lunch or home."""
    screen = io.StringIO()
    runs = plan_study(study({"seeds": [1, 2]})).runs
    jobs = [Job(run, "waiting", Rows(None, None)) for run in runs]
    with SweepShown(Console(file=screen, force_terminal=True, width=120, height=40)) as shown:
        shown.begun(jobs[0])
        jobs[0].stage, jobs[0].rows = "training", Rows({"step": 5, "loss": 4.25}, {"step": 0, "loss": 5.875})
        shown.look(jobs)
        jobs[0].stage, jobs[0].exit_code = "failed", 3
        shown.ended(jobs[0])
    text = screen.getvalue()
    for word in (
        "1 training, 1 waiting, about 0:00:0",
        "5",
        "4.2500",
        "5.8750",
        "FAILED after update 5 of 20, exit code 3",
    ):
        assert word in text
    assert all(run.name in text for run in runs)


def test_the_shipped_studies_are_what_they_say() -> None:
    """A user's first sweep would end in an error, or in other runs than its first line promises."""
    planned = {path.stem: plan_study(path) for path in STUDIES}
    sizes = {"ablation": 18, "cooldowns": 15, "law": 4, "peaks": 30}
    assert {name: len(one.runs) for name, one in planned.items()} == sizes
    ablation = planned["ablation"].runs
    assert len({run.cell for run in ablation}) == 6 and {run.config.run.seed for run in ablation} == {1, 2, 3}
    assert {run.schedule.name for run in ablation} == {"cosine", "linear", "step"}
    shapes = {run.config.schedule.shape["cooldown"] for run in planned["cooldowns"].runs}
    assert shapes >= {"linear", "1-sqrt", "cosine", "square"}
    by_cell = {run.cell: 0 for run in planned["peaks"].runs}
    assert [run.split("-")[0] for run in by_cell] == ["cosine", "linear", "wsd"]


def test_peaks_are_analysed_and_an_edge_is_named(tmp_path: Path) -> None:
    """A schedule would lose because its best peak lay outside the sweep, and nobody would be told."""
    best = {"cosine": 1.7e-3, "linear": 1.4e-3, "wsd": 4.5e-3}  # wsd's is above all that is swept
    (path,) = (path for path in STUDIES if path.stem == "peaks")
    planned = plan_study(path, [f"dir={tmp_path}"])
    for run in planned.runs:
        schedule = run.config.schedule
        doublings = math.log2(schedule.peak / best[schedule.name])
        words = [f"schedule.{key}={value}" for key, value in schedule.shape.items()]
        words += [f"schedule.{key}={getattr(schedule, key)}" for key in ("name", "peak", "warmup", "floor")]
        seed = run.config.run.seed
        write_run(tmp_path / run.name, 4.5 + 0.02 * doublings**2 + 0.01 * seed, *words, seed=seed)
    write_study(planned)
    assert {state_of(run) for run in planned.runs} == {"begun"}  # validated, not saved
    comparison = compare([tmp_path])
    found = as_json(comparison)
    assert found["baseline"] == "cosine" and "tokens_per_s" not in found["runs"][0]
    assert {cell: fit["edge"] for cell, fit in found["peaks"].items()} == {"cosine": "", "linear": "", "wsd": "highest"}
    for name in ("cosine", "linear"):
        fit = found["peaks"][name]
        assert fit["optimum"] == pytest.approx(best[name], rel=1e-6) and fit["best"] == 1.5e-3
        assert fit["rise_at_half_and_double"] == pytest.approx(0.02) and fit["loss"] == pytest.approx(4.515)
    assert any(
        "its best peak 0.003 is the highest that was run; run one beyond it" in said for said in found["warnings"]
    )
    assert any("tokens a parameter are short: there the area decides" in said for said in found["warnings"])
    areas = {(row["schedule"], row["peak"]): row["area"] for row in found["schedules"]}
    assert areas["cosine", 1.5e-3] == pytest.approx(1.5e-3 * 80, rel=0.01)
    text = markdown(comparison)
    assert "| schedule | peak | area |" in text and "## Peaks" in text and "tokens/s" not in text


def test_a_comparison_knows_what_a_study_still_lacks(tmp_path: Path, study: MakeStudy) -> None:
    """A cell that never ran would be forgotten, and a folder that does not belong to the study compared with it."""
    path = study({"schedules": [{"name": "linear"}, {"name": "cosine"}]}, baseline="cosine-w4")
    planned = plan_study(path)
    write_study(planned)
    for run in planned.runs:
        write_run(run.folder, 4.5, f"schedule.name={run.schedule.name}")
    write_run(tmp_path / "s" / "foreign", 4.4, "schedule.name=wsd")
    found = as_json(compare([tmp_path / "s"]))
    assert [run["run"] for run in found["runs"]] == names(planned) and found["baseline"] == "cosine"
    (planned.runs[0].folder / "metrics.jsonl").unlink()
    found = as_json(compare([tmp_path / "s"]))
    assert f"not begun, of the study s: {planned.runs[0].name}" in found["warnings"]
    (tmp_path / "s" / "study.json").write_text(json.dumps({"name": "other", "baseline": [], "runs": []}))
    with pytest.raises(ConfigError, match='holds the study "other", this one is "s": write another `dir`'):
        check_study(planned, ["finished", "finished"], 1)
