"""Does `llmtrain law` read runs as they were, refuse what it cannot know, and say so by name?"""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.cli_law import law_app
from llmtrain.config_file import load_config
from llmtrain.errors import ConfigError, DataError, LlmtrainError, ScheduleError
from llmtrain.schedules import plan
from llmtrain.study.law.curves import LossCurve, rates_between, read_curve, setting_of
from llmtrain.study.law.fitted import doubts_of_tests, fit_curves
from llmtrain.study.law.kept import read_law
from llmtrain.study.law.trust import Range, check_curves, doubts_of_fit, doubts_of_schedule
from tests.law_reference import PEAK, known_curve, rates, write_csv

REPO = Path(__file__).parent.parent
COVERED = Range(peak=PEAK, warmup=100, updates=2000, lowest=0.1, setting={"weight decay": 0.1})

Law = Callable[..., Any]


@pytest.fixture
def law(capsys: pytest.CaptureFixture[str]) -> Law:
    """Run `llmtrain law` in this process; its stdout, or what it raises."""

    def run(*words: object) -> str:
        law_app(args=[str(word) for word in words], standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CSV files of three runs, and the law fitted to two of them."""
    folder = tmp_path_factory.mktemp("law")
    found = {name: write_csv(known_curve(name, noise=1e-3), folder) for name in ("wsd", "cosine", "linear")}
    law_app(
        args=["fit", str(found["wsd"]), str(found["cosine"]), "--out", str(folder / "law.json")], standalone_mode=False
    )
    return {**found, "law": folder / "law.json"}


def run_folder(folder: Path, curve: LossCurve, first: int = 1, **overrides: Any) -> Path:
    """A run folder in which the curve's losses are validations, and each update's training loss is 3."""
    values = yaml.safe_load((REPO / "configs" / "demo_cosine.yaml").read_text())
    values["run"]["name"] = folder.name
    for key, value in overrides.items():
        section, _, field = key.partition("__")
        values[section][field] = value
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    measured = dict(zip(curve.steps.tolist(), curve.losses.tolist(), strict=True))
    rows: list[dict[str, Any]] = []
    for step, lr in enumerate(curve.lrs.tolist(), start=1):
        if step >= first:
            rows.append({"kind": "step", "step": step, "lr": lr, "loss": 3.0})
        if step >= first and step in measured:
            validation = {"kind": "validation", "set": "validation", "step": step, "loss": measured[step]}
            rows += [validation | {"set_hash": "v", "model_hash": "m"}, validation | {"set": "other", "loss": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_run_folder_gives_its_own_rates_and_validations(tmp_path: Path) -> None:
    """The law would be fitted to training losses, to another set, or to rates the run did not use."""
    known = known_curve("wsd")
    found = read_curve(run_folder(tmp_path / "a", known))
    assert np.array_equal(found.lrs, known.lrs) and np.array_equal(found.steps, known.steps)
    assert np.array_equal(found.losses, known.losses) and found.warmup == 100
    assert found.setting["model"] == "m" and found.setting["weight decay"] == 0.1


def test_training_losses_are_averaged_over_blocks(tmp_path: Path) -> None:
    """With few validations no law could be fitted at all, or one to the noise of single batches."""
    found = read_curve(run_folder(tmp_path / "a", known_curve("wsd")), kind="train")
    assert len(found.steps) == 200 and np.all(found.losses == 3.0)
    assert found.steps[0] > 100 and found.steps[-1] <= 2000 and np.all(np.diff(found.steps) > 0)


def test_branch_is_read_with_its_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cooldown that branched off a trunk, the cheapest run for a law, could not be used, or without its past."""
    monkeypatch.chdir(tmp_path)
    known = known_curve("wsd")
    run_folder(tmp_path / "trunk", replace(known_curve("constant"), losses=known.losses))
    found = read_curve(run_folder(tmp_path / "branch", known, first=1501, run__branch_from="trunk@1500"))
    assert np.array_equal(found.lrs, known.lrs) and np.array_equal(found.losses, known.losses)
    lost = run_folder(tmp_path / "lost", known, first=1501)
    with pytest.raises(DataError, match="starts at update 1501: wanted the learning rates from update 1 on"):
        read_curve(lost)


def test_rates_between_rows(tmp_path: Path) -> None:
    """Drops would be smeared over rows, or the warm-up's area be lost."""
    steps, lrs = np.array([4, 8, 12, 16]), np.array([1.0, 1.0, 0.5, 0.5])
    assert rates_between(steps, lrs, 4).tolist() == [0.25, 0.5, 0.75, *[1.0] * 8, *[0.5] * 5]
    assert rates_between(steps, lrs, 2).tolist()[:4] == [0.5, 1.0, 1.0, 1.0]
    assert rates_between(steps, lrs, 0).tolist()[:2] == [1.0, 1.0]
    slope = rates_between(steps, np.array([1.0, 0.8, 0.4, 0.2]), 4)
    assert np.allclose(slope[4:8], [0.95, 0.9, 0.85, 0.8]) and np.allclose(slope[8:12], [0.7, 0.6, 0.5, 0.4])


def test_warmup_and_burn_in_leave_losses_out(tmp_path: Path) -> None:
    """The steep losses of the warm-up would bend the law of all that follows."""
    path = write_csv(known_curve("wsd"), tmp_path)
    assert (read_curve(path).warmup, read_curve(path).steps[0]) == (100, 125)
    found = read_curve(path, warmup=100, burn_in=200)
    assert (found.warmup, found.steps[0]) == (100, 325) and found.lrs[49] == PEAK / 2


@pytest.mark.parametrize(
    "text, said",
    [
        ("step,lr\n1,2\n", "has no column loss"),
        ("step,loss,lr\n100,3.0,1e-3\n200,nan,1e-3\n", "line 3: loss is 'nan', wanted a finite number"),
        ("step,lr,loss\n100,1e-3,3.0\n200,1e-3\n", "line 3: loss is None"),
        ("step,lr,loss\n100,1e-3,inf\n", "line 2: loss is 'inf'"),
        ("step,lr,loss\n200,1e-3,3.0\n100,1e-3,3.0\n", "step 100 in row 2, wanted whole numbers from 1 on that rise"),
        ("step,lr,loss\n0,1e-3,3.0\n100,1e-3,3.0\n", "step 0 in row 1"),
        ("step,lr,loss\n1.5,1e-3,3.0\n100,1e-3,3.0\n", "step 1.5 in row 1"),
        ("step,lr,loss\n1,-1e-3,3.0\n100,1e-3,3.0\n", "learning rates from -0.001 to 0.001"),
        ("step,lr,loss\n", "holds 0 rows"),
        ("", "has no column step"),
    ],
)
def test_bad_file_is_told_with_its_place(law: Law, tmp_path: Path, text: str, said: str) -> None:
    """A user would have to find the broken row of thousands, or get a law of nonsense."""
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=r"a\.csv") as found:
        law("fit", path, path)
    assert said in str(found.value)


def test_missing_file_and_broken_run_are_told(law: Law, tmp_path: Path) -> None:
    """A typing mistake would end in a traceback."""
    write_csv(known_curve("wsd"), tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*wsb.csv.*wsd.csv"):
        law("fit", tmp_path / "wsb.csv", tmp_path / "wsd.csv")
    with pytest.raises(DataError, match="not a run folder"):
        law("fit", tmp_path, tmp_path)
    broken = run_folder(tmp_path / "broken", replace(known_curve("wsd"), losses=np.full(76, np.nan)))
    with pytest.raises(DataError, match="a loss that is not finite"):
        law("fit", broken, broken)


def few(name: str, count: int) -> LossCurve:
    """A run with `count` losses at even distances."""
    curve = known_curve(name)
    kept = np.linspace(0, len(curve.steps) - 1, count).astype(int)
    return replace(curve, steps=curve.steps[kept], losses=curve.losses[kept])


def trunk_only() -> LossCurve:
    """A wsd run whose losses end as its decay begins."""
    curve = known_curve("wsd")
    kept = curve.steps <= 1700
    return replace(curve, steps=curve.steps[kept], losses=curve.losses[kept])


FITS = {
    "one_run": lambda: [known_curve("wsd")],
    "too_few_points": lambda: [few("wsd", 39), known_curve("cosine")],
    "too_few_in_decay": lambda: [trunk_only(), known_curve("cosine")],
    "peaks_differ": lambda: [known_curve("wsd"), replace(known_curve("cosine"), lrs=rates("cosine", 2000, peak=2e-3))],
    "rises": lambda: [known_curve("wsd"), replace(known_curve("cosine"), lrs=rates("sgdr:cycles=2", 2000))],
    "settings_differ": lambda: [
        replace(known_curve("wsd"), setting={"weight decay": 0.1}),
        replace(known_curve("cosine"), setting={"weight decay": 0.2}),
    ],
    "no_decay": lambda: [known_curve("constant"), known_curve("constant")],
    "slow_decays_only": lambda: [known_curve("cosine"), known_curve("linear")],
}


@pytest.mark.parametrize("name", FITS)
def test_fit_is_refused_by_name(name: str) -> None:
    """A law would be printed that the runs cannot tell."""
    with pytest.raises(DataError, match=f"^{name}: "):
        check_curves(FITS[name]())


def test_runs_that_tell_a_law_are_accepted() -> None:
    """The recommended runs would be refused."""
    for names in (("wsd", "cosine"), ("wsd", "linear"), ("constant", "wsd"), ("constant", "cosine", "wsd")):
        check_curves([known_curve(name) for name in names])
    assert doubts_of_fit([known_curve("wsd"), known_curve("cosine")], []) == []


def test_fit_without_a_sharp_decay_is_marked() -> None:
    """Constant and cosine alone would look as good a choice as a wsd run."""
    found = fit_curves([known_curve("constant", noise=1e-3), known_curve("cosine", noise=1e-3)])
    assert "no_sharp_decay" in {doubt.name for doubt in found.doubts}


def test_parameter_at_its_bound_is_marked() -> None:
    """A bound would be read as a measurement."""
    curves = [known_curve("wsd"), known_curve("cosine")]
    falling = [replace(curve, losses=3.0 - 0.2 * curve.steps / 2000) for curve in curves]
    found = [doubt.text for doubt in fit_curves(falling).doubts if doubt.name == "unidentified"]
    assert found and all("the runs do not tell" in text for text in found)


SCHEDULES: dict[str, tuple[np.ndarray, dict[str, Any], bool]] = {
    "peak_above": (rates("wsd", 2000, peak=2e-3), {}, True),
    "peak_below": (rates("wsd", 2000, peak=5e-4, floor=0.2), {}, False),
    "in_warmup": (rates("wsd", 2000)[:90], {}, True),
    "rises": (rates("sgdr:cycles=2", 2000), {}, True),
    "horizon_beyond": (rates("wsd", 4001), {}, False),
    "lr_below": (rates("wsd", 2000, floor=0.05), {}, False),
    "setting": (rates("wsd", 2000), {"weight decay": 0.2, "tokens per update": 7}, True),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_outside_of_the_fitted_runs_is_named(name: str) -> None:
    """A guess would be shown as a prediction."""
    lrs, setting, refuses = SCHEDULES[name]
    found = doubts_of_schedule(COVERED, lrs, int(np.argmax(lrs)) + 1, setting)
    assert [(doubt.name, doubt.refuses) for doubt in found] == [(name, refuses)]


def test_schedule_within_the_fitted_runs_has_no_doubts() -> None:
    """Every prediction would carry a warning, and none would be read."""
    for name in ("wsd", "cosine", "constant", "linear"):
        assert doubts_of_schedule(COVERED, rates(name, 4000), 100, {"weight decay": 0.1}) == []


def test_zero_tail_silences_the_momentum_law(law: Law, files: dict[str, Path]) -> None:
    """The second law would let the loss fall for ever at learning rate 0."""
    knots = "piecewise:floor=0:knots=[[0%, 0], [5%, 1], [50%, 0], [100%, 0]]"
    words = ("--law", files["law"], "--schedule", knots, "--json")
    (found,) = json.loads(law("predict", *words))["schedules"]
    assert "zero_tail" in {doubt["name"] for doubt in found["doubts"]}
    assert found["momentum_loss"] is None and found["loss"] > 2.5


def test_fit_reports_errors_of_every_law(law: Law, files: dict[str, Path], tmp_path: Path) -> None:
    """A user could not see whether the law does better than ignoring the schedule, or would keep another law."""
    kept = tmp_path / "law.json"
    text = law("fit", files["wsd"], files["cosine"], "--warmup", 100, "--test", files["linear"], "--out", kept)
    for part in ("mpl", "momentum", "time", "area", "unseen runs", "mean nothing", "wrote"):
        assert part in text
    found = json.loads(kept.read_text())
    assert set(found["parameters"]) == {"L0", "A", "alpha", "B", "C", "beta", "gamma"}
    assert list(found["laws"]) == ["momentum", "time", "area"]
    for one in (found, *found["laws"].values()):
        for part in ("train", "test"):
            assert 0 < one[part]["mean_relative_error"] <= one[part]["worst_relative_error"]
    assert found["test"]["mean_relative_error"] < found["laws"]["time"]["test"]["mean_relative_error"] / 5
    assert found["test"]["covered_by_95_percent"] >= 0.9
    assert found["resolvable"] == 2 * found["left_out"]["mean"] > 0
    for name, (low, high) in found["intervals"].items():
        assert low <= high, name
    first, second = (law("predict", "--law", path, "--json") for path in (kept, files["law"]))
    assert first == second


def test_run_that_the_law_says_nothing_about_is_no_test(files: dict[str, Path]) -> None:
    """The error on a run of another peak would be read as the error of the law."""
    kept = read_law(files["law"])
    other = replace(known_curve("linear"), lrs=rates("linear", 2000, peak=2e-3))
    with pytest.raises(DataError, match="peak_above: the law says nothing about linear"):
        doubts_of_tests(kept, [other])
    with pytest.raises(DataError, match="too_few_points: linear has no loss"):
        doubts_of_tests(kept, [few("linear", 0)])
    assert doubts_of_tests(kept, [known_curve("linear")]) == {"linear": []}


def test_json_is_what_is_kept(law: Law, files: dict[str, Path], tmp_path: Path) -> None:
    """A script that reads stdout would see another law than the file, or two looks at the same runs two laws."""
    kept = tmp_path / "law.json"
    printed = law("fit", files["wsd"], files["cosine"], "--out", kept, "--json")
    assert json.loads(printed) == json.loads(kept.read_text())
    assert kept.read_bytes() == files["law"].read_bytes()


def test_prediction_ranks_and_says_what_it_cannot_tell(law: Law, files: dict[str, Path], tmp_path: Path) -> None:
    """Two schedules within the error of the law would be ranked as if it mattered."""
    names = ("constant", "wsd", "wsd:decay=20%", "sgdr:cycles=3")
    words = [word for name in names for word in ("--schedule", name)]
    found = json.loads(law("predict", "--law", files["law"], *words, "--csv", tmp_path / "c.csv", "--json"))
    ranked = found["schedules"]
    assert {one["schedule"] for one in ranked[:2]} == {"wsd", "wsd decay=20%"}
    assert ranked[0]["loss"] == ranked[1]["loss"] and not ranked[1]["told_apart"]
    assert ranked[2]["schedule"] == "constant" and ranked[2]["told_apart"]
    assert ranked[3]["loss"] is None and "rises" in {doubt["name"] for doubt in ranked[3]["doubts"]}
    for one in ranked[:3]:
        assert one["updates"] == 2000 and one["interval"][0] < one["loss"] < one["interval"][1]
        assert abs(one["momentum_loss"] - one["loss"]) < 0.05
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert {row["schedule"] for row in rows} == {"constant", "wsd", "wsd decay=20%"}
    last = [row for row in rows if row["schedule"] == "constant"][-1]
    assert float(last["loss"]) == pytest.approx(ranked[2]["loss"], abs=1e-4) and int(last["step"]) == 2000
    text = law("predict", "--law", files["law"])
    assert "cannot tell apart" in text and "cosine" in text and "momentum law" in text


def test_config_is_predicted_as_it_will_run(law: Law, files: dict[str, Path], tmp_path: Path) -> None:
    """The prediction of a config would be of another horizon, or of a run that differs in more than its schedule."""
    config = tmp_path / "run.yaml"
    text = (REPO / "configs" / "demo_cosine.yaml").read_text().replace("160 steps", "1800 steps")
    config.write_text(text.replace("1.5e-3", "1e-3").replace("warmup: 16", "warmup: 100"))
    found = json.loads(law("predict", "--law", files["law"], "--schedule", config, "--json"))["schedules"]
    loaded = load_config(config)
    lrs = plan(loaded.schedule, loaded.batch.tokens).multipliers(np.arange(1, 1801))
    named = json.loads(
        law("predict", "--law", files["law"], "--schedule", "cosine", "--horizon", "1800 steps", "--json")
    )["schedules"]
    assert len(lrs) == found[0]["updates"] == 1800
    assert found[0]["loss"] == pytest.approx(named[0]["loss"], abs=2e-5)
    kept = json.loads(files["law"].read_text())
    kept["range"]["setting"] = setting_of(loaded)
    path = tmp_path / "law.json"
    path.write_text(json.dumps(kept))
    words = ("predict", "--law", path, "--schedule", config, "--json")
    assert json.loads(law(*words))["schedules"][0]["doubts"] == []
    (refused,) = json.loads(law(*words, "--set", "optim.weight_decay=0.3"))["schedules"]
    assert refused["loss"] is None and refused["doubts"][0]["text"] == "weight decay is 0.3, the fitted runs have 0.1"


def test_optimised_section_is_read_by_the_config(law: Law, files: dict[str, Path], tmp_path: Path) -> None:
    """The schedule that was found could not be trained."""
    out = tmp_path / "best.yaml"
    words = ("optimise", "--law", files["law"], "--horizon", "1500 steps", "--out", out)
    found = json.loads(law(*words, "--json"))
    section = yaml.safe_load(out.read_text())
    assert section == {"schedule": found["schedule"]} and found["schedules"][0]["schedule"] == "optimised"
    values = yaml.safe_load((REPO / "configs" / "demo_cosine.yaml").read_text()) | section
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    loaded = load_config(tmp_path / "run.yaml")
    schedule = plan(loaded.schedule, loaded.batch.tokens)
    assert schedule.total_updates == 1500 and schedule(1500) >= 0.0999 and schedule(125) == 1.0
    text = law(*words[:-2])
    assert "gain over" in text and text.endswith(out.read_text())


def test_mistakes_of_the_commands_are_told(law: Law, files: dict[str, Path], tmp_path: Path) -> None:
    """A user would get a traceback, or an answer to another question."""
    mistakes: list[tuple[tuple[object, ...], type[LlmtrainError], str]] = [
        (("predict", "--law", tmp_path / "no.json"), DataError, "law fit RUNS --out"),
        (("predict", "--law", files["wsd"]), DataError, "is not JSON"),
        (("predict", "--law", files["law"], "--schedule", "cosin"), ScheduleError, "cosine"),
        (("predict", "--law", files["law"], "--schedule", "no.yaml"), ConfigError, "no.yaml"),
        (("optimise", "--law", files["law"], "--horizon", "2000"), ConfigError, "has no unit"),
        (("optimise", "--law", files["law"], "--horizon", "1B tokens"), ConfigError, "write it in steps"),
        (("optimise", "--law", files["law"], "--horizon", "150 steps"), ScheduleError, "leave 50 updates to shape"),
    ]
    for words, kind, said in mistakes:
        with pytest.raises(kind) as found:
            law(*words)
        assert said in str(found.value)
    for text, said in (("{}", "not of format 1"), ('{"format": 1}', "is damaged")):
        (tmp_path / "law.json").write_text(text)
        with pytest.raises(DataError, match=said):
            law("predict", "--law", tmp_path / "law.json")
