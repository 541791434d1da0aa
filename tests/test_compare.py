"""Does `llmtrain compare` find what was better, refuse what cannot be compared, and claim no more than the runs say?"""

import csv
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main
from llmtrain.errors import ConfigError, DataError
from llmtrain.study.compare import compare
from llmtrain.study.record import read_record, run_folders
from llmtrain.study.report import markdown, sentences
from llmtrain.study.report_data import as_json
from tests.compare_runs import REPO, TOKENS, UPDATES, falling, write_run

MARGIN = math.log1p(0.005)
LINEAR, WSD = "schedule.name=linear", "schedule.name=wsd"
Compare = Callable[..., str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Compare:
    """Run `llmtrain compare` in this process; its stdout, or its stderr where it refuses."""

    def run(*words: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *map(str, words)])
        out, err = capsys.readouterr()
        assert (ended.value.code, "Traceback" in err) == (code, False), err
        return out if code == 0 else err

    return run


def write_study(folder: Path, ends: dict[str, float], seeds: int = 3, noise: float = 0.002, **keys: Any) -> Path:
    """Runs of schedules, named NAME or NAME:KEY=VALUE, that end near these losses; a seed moves all alike."""
    generator = np.random.default_rng(0)
    for seed in range(1, seeds + 1):
        shared = generator.normal(0, 0.02)
        for name, end in ends.items():
            words = [f"schedule.{word}" for word in f"name={name}".split(":")]
            loss = end + shared + generator.normal(0, noise)
            write_run(folder / re.sub(r"\W+", "_", f"{name} s{seed}"), loss, *words, seed=seed, **keys)
    return folder


def reading(found: dict[str, Any], name: str) -> dict[str, Any]:
    return found["readings"][name]  # type: ignore[no-any-return]


def said(folder: Path, name: str, **keys: Any) -> list[tuple[str, str]]:
    """The sentences of one reading."""
    comparison = compare([folder], **keys)
    (one,) = (one for one in comparison.readings if one.name == name)
    return sentences(comparison, one)


def test_seeds_are_replicates_and_parameters_tell_schedules_apart(tmp_path: Path) -> None:
    """Runs of two schedules would be averaged, or seeds of one compared with each other."""
    write_study(tmp_path, {"cosine": 4.6, "wsd:decay=10%": 4.5, "wsd:decay=30%": 4.4})
    write_run(tmp_path / "other_decay", 4.7, "optim.weight_decay=0.2", seed=4)
    found = as_json(compare([tmp_path], baseline="cosine_s1"))
    rows = {row["schedule"]: row for row in found["schedules"]}
    assert set(rows) == {
        "wsd decay=10% optim.weight_decay=0.1",
        "wsd decay=30% optim.weight_decay=0.1",
        "cosine optim.weight_decay=0.1",
        "cosine optim.weight_decay=0.2",
    }
    assert rows["cosine optim.weight_decay=0.1"]["seeds"] == [1, 2, 3]
    assert any("differ in more than their schedule: optim.weight_decay" in text for text in found["warnings"])


def test_paired_difference_of_known_runs(tmp_path: Path) -> None:
    """The number that decides, and its interval, would be wrong."""
    for seed, (cosine, linear) in enumerate([(4.60, 4.57), (4.62, 4.58), (4.56, 4.54)]):
        write_run(tmp_path / f"cosine_{seed}", cosine, seed=seed)
        write_run(tmp_path / f"linear_{seed}", linear, LINEAR, seed=seed)
    found = as_json(compare([tmp_path], baseline="cosine"))
    for name in ("same peak", "same area"):
        (one,) = reading(found, name)["compared"]
        assert (one["schedule"], one["against"], one["seeds"], one["paired"]) == ("linear", "cosine", 3, True)
        assert one["nats"] == pytest.approx(-0.03) and one["deviation"] == pytest.approx(0.01)
        assert one["interval"] == pytest.approx([-0.03 - 0.02484, -0.03 + 0.02484], abs=1e-5)  # t(2) = 4.303
        assert one["perplexity_percent"] == pytest.approx(100 * (math.exp(-0.03) - 1))
        assert one["verdict"] == "better" and one["p"] == one["p_holm"] == pytest.approx(0.0351, abs=1e-4)
    assert found["ranked"] and [run["loss"] for run in found["runs"]] == sorted(run["loss"] for run in found["runs"])


def test_one_seed_claims_no_interval(tmp_path: Path, command: Compare) -> None:
    """A difference that another seed would turn round would be sold as a result."""
    runs = [write_run(tmp_path / "a", 4.6), write_run(tmp_path / "b", 4.5, LINEAR)]
    text = command(*runs)
    assert "b" in text and "another seed may turn it round, and no interval is claimed" in text
    assert "run each with three or more values of run.seed" in text and "95 %" not in text and "Holm" not in text
    (one,) = reading(json.loads(command(*runs, "--json")), "same peak")["compared"]
    assert (one["verdict"], one["interval"], one["p"], one["paired"]) == ("one seed", None, None, True)


def test_unresolvable_difference_says_how_many_seeds_would_help(tmp_path: Path) -> None:
    """Too few runs would pass for equal schedules."""
    write_study(tmp_path, {"cosine": 4.6, "linear": 4.6}, noise=0.02)
    ((verdict, text),) = said(tmp_path, "same peak", baseline="cosine")
    assert verdict == "not resolvable" and "seeds would show a difference of 0.5 % of perplexity" in text


def test_schedules_within_the_margin_are_called_equivalent(tmp_path: Path, command: Compare) -> None:
    """A user would go on searching among schedules that do not differ."""
    write_study(tmp_path, {"cosine": 4.6, "linear": 4.6}, seeds=6, noise=0.0004)
    ((verdict, text),) = said(tmp_path, "same peak", baseline="cosine")
    assert verdict == "equivalent" and "a difference of 0.5 % of perplexity or more is ruled out" in text
    ((verdict, _),) = said(tmp_path, "same peak", baseline="cosine", margin=0.0001)
    assert verdict == "not resolvable"
    assert "of 0.01 % of perplexity" in command(tmp_path, "--margin", "0.01%")
    assert "write a share of perplexity in percent, for example 0.5%" in command(tmp_path, "--margin", "0.5", code=2)


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"tokens": 12}, "tokens seen"),
        ({"data_hash": "other"}, "data"),
        ({"tokenizer_hash": "other"}, "tokenizer"),
        ({"set_hash": "other"}, "validation set"),
        ({"model_hash": "other"}, "model"),
        ({"initial_weights": "imported"}, "initial weights"),
    ],
)
def test_what_differs_is_not_ranked(tmp_path: Path, command: Compare, facts: dict[str, Any], name: str) -> None:
    """A run would win by its data, its tokenizer, its text, its length, its size or its first weights."""
    runs = [write_run(tmp_path / "a", 4.6), write_run(tmp_path / "b", 4.5, LINEAR, **facts)]
    found = json.loads(command(*runs, "--json", "--html", tmp_path / "r.html", "--md", tmp_path / "r.md"))
    assert (found["ranked"], found["readings"], found["schedules"]) == (False, {}, [])
    (mismatch,) = found["mismatches"]
    assert mismatch.startswith(f"{name} differ: ") and "in a; " in mismatch and "To compare them: " in mismatch
    assert [run["run"] for run in found["runs"]] == ["a", "b"]
    text = command(*runs)
    assert "NOT RANKED" in text and f"{name} differ" in text and "better" not in text
    for page in ("r.html", "r.md"):
        written = (tmp_path / page).read_text()
        assert "Not ranked" in written and f"{name} differ" in written


def test_run_that_did_not_reach_its_end_is_set_aside(tmp_path: Path) -> None:
    """The survivors of a schedule that diverges would win, or one dead run would keep all from being ranked."""
    write_study(tmp_path, {"cosine": 4.6, "linear": 4.5}, seeds=2)
    write_run(tmp_path / "linear_dead", 1.0, LINEAR, seed=3, until=70)
    write_run(tmp_path / "linear_nan", 1.0, LINEAR, seed=4, losses=lambda k: np.where(k > 90, np.nan, 1.0))
    found = as_json(compare([tmp_path], baseline="cosine"))
    assert found["ranked"] and json.dumps(found, allow_nan=False)
    assert [run["run"] for run in found["runs"] if not run["finished"]] == ["linear_dead", "linear_nan"]
    assert next(row for row in found["schedules"] if row["schedule"] == "linear")["seeds"] == [1, 2]
    text = " ".join(found["warnings"])
    assert "linear_dead (linear, peak 0.0015, seed 3) did not reach its end: it ended after update 70 of 160" in text
    assert "its loss was not finite at update 91" in text and "looks better for it" in text


def test_runs_still_training_are_compared_where_they_stand(tmp_path: Path) -> None:
    """Two runs that are half way could not be looked at together, or their order would pass for the final one."""
    runs = [write_run(tmp_path / "a", 4.6, until=80), write_run(tmp_path / "b", 4.5, LINEAR, until=80)]
    found = as_json(compare(runs))
    assert found["ranked"] and [run["run"] for run in found["runs"]] == ["b", "a"]
    assert "no run was annealed at its end: a cooldown may turn the order round" in found["warnings"]
    assert sum("did not reach its end" in text for text in found["warnings"]) == 2


def test_unannealed_end_is_marked(tmp_path: Path, command: Compare) -> None:
    """A trunk before its cooldown would be ranked against finished runs without a word."""
    runs = [write_run(tmp_path / "a", 4.6), write_run(tmp_path / "b", 4.5, "schedule.name=constant")]
    text = command(*runs)
    assert "constant (not annealed)" in text and "; not annealed at the end: constant." in text
    assert "note: not annealed at the end: constant. A cooldown would lower its loss" in text


def test_same_area_names_the_peak_that_is_missing_and_then_finds_it(tmp_path: Path) -> None:
    """A schedule that wins by more learning rate in total would pass for a better shape."""
    write_run(tmp_path / "cosine", 4.6)
    write_run(tmp_path / "wsd", 4.5, WSD)
    ((verdict, text),) = said(tmp_path, "same area", baseline="cosine")
    assert verdict == "missing" and text.startswith("Not within 2 % of the area of cosine: run wsd with schedule.peak=")
    peak = text.rpartition("=")[2].rstrip(".")
    ((_, text),) = said(tmp_path, "same peak", baseline="cosine")
    assert " with 1.58 times its area" in text
    write_run(tmp_path / "wsd_area", 4.55, WSD, f"schedule.peak={peak}")
    found = as_json(compare([tmp_path], baseline="cosine"))
    (one,) = reading(found, "same area")["compared"]
    assert one["nats"] == pytest.approx(-0.05) and one["peak"] == float(peak)
    assert reading(found, "same area")["missing"] == ""
    areas = [row["area"] for row in found["schedules"] if row["peak"] in (float(peak), 1.5e-3)]
    assert min(areas) / sorted(areas)[1] > 0.99


def test_each_at_its_best_peak(tmp_path: Path) -> None:
    """One schedule would be judged at a peak that suits the other, and a search cut short would not be noticed."""
    for name, best in (("cosine", 2e-3), ("linear", 1e-3), ("wsd", 1e-2)):
        for peak in (5e-4, 1e-3, 2e-3, 4e-3):
            end = 4.6 - 0.01 * (name == "linear") + 0.03 * math.log2(peak / best) ** 2
            write_run(tmp_path / f"{name}_{peak:g}", end, f"schedule.name={name}", f"schedule.peak={peak}")
    write_run(tmp_path / "once", 4.9, "schedule.name=one_cycle", "schedule.warmup=0 steps")
    found = as_json(compare([tmp_path], baseline="cosine"))
    best = {one["schedule"]: one for one in reading(found, "best peak")["compared"]}
    linear = next(one for name, one in best.items() if name.startswith("linear"))
    assert (linear["peak"], linear["against_peak"]) == (1e-3, 2e-3) and linear["nats"] == pytest.approx(-0.01)
    fits = {name.split()[0]: fit for name, fit in found["peaks"].items()}
    assert fits["cosine"]["optimum"] == pytest.approx(2e-3) and fits["cosine"]["loss"] == pytest.approx(4.6)
    assert fits["cosine"]["rise_at_half_and_double"] == pytest.approx(0.03)
    assert fits["wsd"]["edge"] == "highest" and fits["wsd"]["optimum"] is None
    assert any(
        text.startswith("wsd") and "its best peak 0.004 is the highest that was run" in text
        for text in found["warnings"]
    )
    assert reading(found, "best peak")["missing"].startswith("Run at one peak only: one_cycle")
    assert {one["peak"] for one in reading(found, "same peak")["compared"]} == {5e-4, 1e-3, 2e-3, 4e-3}


def test_peak_that_diverged_is_the_end_of_a_search(tmp_path: Path) -> None:
    """A user would be told to try a higher peak than the one that blew up."""
    for peak, end in ((1e-3, 4.7), (2e-3, 4.6)):
        write_run(tmp_path / f"cosine_{peak:g}", end, f"schedule.peak={peak}")
    assert as_json(compare([tmp_path]))["peaks"]["cosine"]["edge"] == "highest"
    write_run(tmp_path / "cosine_0.004", 4.6, "schedule.peak=4e-3", until=40)
    found = as_json(compare([tmp_path]))
    assert found["peaks"]["cosine"]["edge"] == "" and reading(found, "best peak")["missing"] == ""


def test_run_without_updates_of_its_own(tmp_path: Path, command: Compare) -> None:
    """Weights that were imported and only scored would end a report in a traceback."""
    scored = write_run(tmp_path / "scored", 4.4, until=0)
    row = json.loads((write_run(tmp_path / "whole", 4.6) / "metrics.jsonl").read_text().splitlines()[-1])
    (scored / "metrics.jsonl").write_text(json.dumps({**row, "step": 160}) + "\n")
    found = json.loads(command(tmp_path, "--json", "--html", tmp_path / "r.html", "--png", tmp_path / "r.png"))
    assert {run["run"]: run["area"] is None for run in found["runs"]} == {"scored": True, "whole": False}


def test_rates_that_are_not_those_of_the_schedule_are_named(tmp_path: Path) -> None:
    """A run trained on other rates than its config says would stand for that schedule."""
    assert read_record(write_run(tmp_path / "a", 4.6)).rate_error == 0
    write_run(tmp_path / "b", 4.5, LINEAR, lr_factor=1.01)
    (text,) = (text for text in compare([tmp_path]).warnings if "off its schedule" in text)
    assert text == "b used learning rates up to 0.01 of its peak off its schedule"


def test_spikes_are_counted(tmp_path: Path) -> None:
    """A run that nearly blew up would look as calm as the others."""

    def spiky(k: np.ndarray) -> np.ndarray:
        return falling(4.6)(k) + 0.01 * np.sin(k) + 3.0 * (k == 150)

    write_run(tmp_path / "a", 4.6, losses=spiky)
    found = as_json(compare([write_run(tmp_path / "b", 4.5, LINEAR), tmp_path / "a"]))
    assert {run["run"]: run["spikes"] for run in found["runs"]} == {"a": 1, "b": 0}
    assert "spikes of the training loss: a 1" in found["warnings"]


def test_time_to_a_target(tmp_path: Path, command: Compare) -> None:
    """Someone who pays by the token could not ask which schedule gets there first."""
    runs = [write_run(tmp_path / "a", 4.6), write_run(tmp_path / "b", 4.7, LINEAR)]
    found = {run["run"]: run["at_target"] for run in json.loads(command(*runs, "--target", 4.65, "--json"))["runs"]}
    assert found["a"] == {"step": 60, "tokens": 60 * TOKENS, "loss": falling(4.6)(60), "decayed": False}
    assert found["b"] is None
    text = command(*runs, "--target", "4.65")
    assert "updates to 4.65" in text and "never" in text and f"{60 * TOKENS:,}" in text


def test_noise_of_the_text_stands_beside_that_of_the_seeds(tmp_path: Path) -> None:
    """A difference between seeds and one between texts would be taken for each other, or one of them forgotten."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 40, 50).astype(np.float64)
    nats = tokens * 4.5
    for seed in (1, 2):
        for name, own in (("cosine", 0.0), ("linear", -0.02)):
            scored = nats + tokens * (own + generator.normal(0, 0.1, 50))
            write_run(
                tmp_path / f"{name}_{seed}",
                float(scored.sum() / tokens.sum()),
                f"schedule.name={name}",
                seed=seed,
                documents=np.stack([scored, tokens], axis=1),
                num_tokens=int(tokens.sum()),
            )
    found = as_json(compare([tmp_path]))
    (one,) = reading(found, "same peak")["compared"]
    low, high = one["text_noise"]
    assert low < one["nats"] < high and high - low != pytest.approx(one["interval"][1] - one["interval"][0])
    ((_, text),) = said(tmp_path, "same peak")
    assert "other validation text would move it by +-" in text
    np.save(tmp_path / "linear_2" / "validation_documents.npy", np.stack([nats + 9 * tokens, tokens], axis=1))
    assert reading(as_json(compare([tmp_path])), "same peak")["compared"][0]["text_noise"] is None  # of another update
    (tmp_path / "linear_2" / "validation_documents.npy").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"validation_documents\.npy cannot be read"):
        read_record(tmp_path / "linear_2")


def test_noise_of_a_text_of_few_documents_is_not_known(tmp_path: Path) -> None:
    """A validation set of one long document would seem to have no noise at all."""
    documents = np.array([[4.5 * 500, 500.0]] * 2)
    for name in ("cosine", "linear"):
        write_run(tmp_path / name, 4.5, f"schedule.name={name}", documents=documents)
    assert reading(as_json(compare([tmp_path])), "same peak")["compared"][0]["text_noise"] is None


def test_branch_has_the_area_of_its_trunk_too(tmp_path: Path) -> None:
    """A cooldown would seem to have used a tenth of the learning rate it took."""
    whole = read_record(write_run(tmp_path / "whole", 4.6))
    trunk = write_run(tmp_path / "trunk", 4.6)
    branch = write_run(tmp_path / "branch", 4.6, f"run.branch_from={trunk}@100", schedule_hash="joined")
    rows = (branch / "metrics.jsonl").read_text().splitlines()
    (branch / "metrics.jsonl").write_text("\n".join(row for row in rows if json.loads(row)["step"] > 100) + "\n")
    found = read_record(branch)
    assert found.area == pytest.approx(whole.area, rel=1e-12) and found.rate_error is None
    assert found.area_at(120) == pytest.approx(whole.area_at(120), rel=1e-12)
    moved = trunk.rename(tmp_path / "elsewhere")
    assert math.isnan(read_record(branch).area)
    labels = {run["cell"] for run in as_json(compare([branch, moved]))["runs"]}
    assert labels == {"cosine", "cosine branch=@100"}


def test_repeated_seed_is_no_replicate(tmp_path: Path) -> None:
    """The same run, done twice, would halve the error that the report claims."""
    for name in ("a", "b"):
        write_run(tmp_path / name, 4.6)
    write_run(tmp_path / "c", 4.5, LINEAR)
    comparison = compare([tmp_path])
    assert [len(entry.runs) for entry in comparison.entries] == [1, 1]
    assert any("b repeats a, seed and all" in text for text in comparison.warnings)


def test_baseline_by_schedule_or_run_and_its_mistakes(tmp_path: Path) -> None:
    """A user would be compared with something else than was meant, or not learn what could be meant."""
    write_study(tmp_path, {"cosine": 4.6, "wsd:decay=10%": 4.5, "wsd:decay=30%": 4.4}, seeds=1)
    assert compare([tmp_path]).baseline == "cosine"
    assert compare([tmp_path], baseline="wsd_decay_10_s1").baseline == "wsd decay=10%"
    assert compare([tmp_path], baseline="wsd decay=30%").baseline == "wsd decay=30%"
    with pytest.raises(ConfigError, match="--baseline wsd could be wsd decay=10%, wsd decay=30%"):
        compare([tmp_path], baseline="wsd")
    with pytest.raises(ConfigError, match='did you mean "cosine"'):
        compare([tmp_path], baseline="cosin")


def test_folders_that_hold_no_run(tmp_path: Path, command: Compare) -> None:
    """A misspelt folder would give an empty report, and a run just begun would keep others from being compared."""
    (tmp_path / "empty").mkdir()
    assert "empty is not a run folder" in command(tmp_path / "empty", code=2)
    runs = [write_run(tmp_path / "study" / name, 4.6, seed=i) for i, name in enumerate("ab")]
    begun = write_run(tmp_path / "study" / "c", 4.6, set="other")
    assert run_folders([tmp_path / "study", runs[0]]) == [*runs, begun]
    assert "has no validation yet" in command(begun, code=2)
    assert f"note: left out: {begun} has no validation yet" in command(tmp_path / "study")
    assert "cannot write" in command(*runs, "--csv", "/dev/null/x.csv", code=2)


def test_markdown_csv_and_json_hold_the_same_numbers(tmp_path: Path, command: Compare) -> None:
    """A table in a paper would differ from the report that it was copied from."""
    folder = write_study(tmp_path / "study", {"cosine": 4.6, "linear": 4.5})
    files = {name: tmp_path / "out" / f"report.{name}" for name in ("md", "csv", "png")}
    words = [word for name, path in files.items() for word in (f"--{name}", path)]
    found = json.loads(command(folder, "--json", *words))
    text = files["md"].read_text()
    assert text == markdown(compare([folder]))
    for run in found["runs"]:
        assert f"| {run['run']} | " in text and f"{run['loss']:.4f}" in text
    for sentence in reading(found, "same peak")["sentences"]:
        assert sentence in text
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    final = {row["run"]: row for row in rows if row["final"] == "True"}
    assert len(rows) == 6 * 8 and {name: float(row["loss"]) for name, row in final.items()} == {
        run["run"]: run["loss"] for run in found["runs"]
    }
    assert all(row["annealed"] == row["final"] for row in rows)
    for run in found["runs"]:
        assert float(final[run["run"]]["area"]) == run["area"]
    assert files["png"].stat().st_size > 20_000


def test_commands_of_the_manual_run(tmp_path: Path, command: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader would copy a command that ends in an error."""
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "runs", {"cosine": 4.6, "linear": 4.5}, seeds=2)
    lines = re.findall(r"^llmtrain compare (.*)$", (REPO / "docs" / "comparing.md").read_text(), re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        assert command(*shlex.split(line, comments=True))


def test_reports_load_no_torch() -> None:
    """A report on a login node would take seconds to start."""
    code = "import sys, llmtrain.study.report_page, llmtrain.study.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_area_is_the_sum_of_the_rates(tmp_path: Path) -> None:
    """Runs would be matched by something else than their learning rates."""
    run = read_record(write_run(tmp_path / "a", 4.6))
    by_hand = 0.0
    for step, lr in zip(run.steps.tolist(), run.lrs.tolist(), strict=True):
        by_hand += lr
        assert run.area_at(step) == pytest.approx(by_hand, rel=1e-12)
    assert run.area == pytest.approx(by_hand, rel=1e-12) and len(run.steps) == UPDATES
