"""The commands, in this process: what they print, and how they refuse."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.cli import main
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.train.metrics import read_metrics
from tests.ranks import Ranks

Leg = Callable[..., Ranks]
Captured = pytest.CaptureFixture[str]


def call(capsys: Captured, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), out, err


@pytest.fixture(scope="module")
def finished(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cosine and a linear run, trained to their end."""
    folder = tmp_path_factory.mktemp("finished")
    runs = {}
    for name in ("cosine", "linear"):
        config = {**prepared, "run": {"name": name, "dir": str(folder / name), "seed": 7}}
        config["schedule"] = {**prepared["schedule"], "name": name}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        code = f"from llmtrain.cli import main; main(['train', '--config', {str(path)!r}])"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
        runs[name] = folder / name
    return runs


def test_eval_recomputes_the_logged_number(finished: dict[str, Path], capsys: Captured) -> None:
    """A published perplexity could not be checked."""
    logged = [row for row in read_metrics(finished["cosine"]) if row["kind"] == "validation"][-1]
    code, out, _ = call(capsys, "eval", str(finished["cosine"]), "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert row["step"] == logged["step"] == 20
    for key in ("loss", "perplexity", "nats_per_byte", "num_tokens", "set_hash"):
        assert row[key] == pytest.approx(logged[key], rel=1e-9) if key != "set_hash" else row[key] == logged[key]
    assert "perplexity" in call(capsys, "eval", str(finished["cosine"]), "--step", "20")[1]


def test_validation_rows_say_what_they_may_be_compared_with(finished: dict[str, Path]) -> None:
    """A half-decayed run, or one on other data, would be ranked against a finished one."""
    rows = [row for row in read_metrics(finished["linear"]) if row["kind"] == "validation"]
    assert [(row["step"], row["decayed"]) for row in rows] == [(0, False), (20, True)]
    for key in ("schedule", "schedule_hash", "data_hash", "tokenizer_hash", "set_hash", "model_hash", "tokens", "lr"):
        assert rows[-1][key] is not None
    assert len({row["set_hash"] for row in rows}) == 1


def test_generate_goes_on_from_the_prompt(finished: dict[str, Path], capsys: Captured) -> None:
    """A user could not look at what the model learnt."""
    words = ("generate", str(finished["cosine"]), "--prompt", "def main(", "--max-tokens", "12")
    code, first, _ = call(capsys, *words, "--temperature", "0")
    assert (code, first[:9]) == (0, "def main(")
    assert len(first) > 10
    assert call(capsys, *words, "--temperature", "0")[1] == first
    assert call(capsys, *words, "--seed", "3")[1] == call(capsys, *words, "--seed", "3")[1]


def test_compare_ranks_runs_and_draws_them(finished: dict[str, Path], tmp_path: Path, capsys: Captured) -> None:
    """The product's question, which schedule was better, would have no answer."""
    runs = [str(path) for path in finished.values()]
    code, out, _ = call(capsys, "compare", *runs, "--json", "--png", str(tmp_path / "figures" / "runs.png"))
    result = json.loads(out)
    assert code == 0
    assert result["ranked"] is True
    assert sorted(row["schedule"] for row in result["runs"]) == ["cosine", "linear"]
    assert result["runs"][0]["loss"] <= result["runs"][1]["loss"]
    assert result["baselines"]["uniform"]["perplexity"] == pytest.approx(350)
    assert (tmp_path / "figures" / "runs.png").stat().st_size > 20_000
    table = call(capsys, "compare", *runs)[1]
    for word in ("cosine", "linear", "perplexity", "nats/byte", "tokens/s", "(unigram)", "(uniform)"):
        assert word in table


def test_compare_does_not_rank_what_differs(finished: dict[str, Path], tmp_path: Path, capsys: Captured) -> None:
    """A run that saw more tokens would win."""
    other = tmp_path / "longer"
    shutil.copytree(finished["linear"], other)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    lines[-1] = json.dumps({**last, "tokens": last["tokens"] * 2, "data_hash": "another"})
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = json.loads(call(capsys, "compare", str(finished["cosine"]), str(other), "--json")[1])
    assert result["ranked"] is False
    assert [text.split(" differ")[0] for text in result["mismatches"]] == ["tokens seen", "data"]
    assert "NOT RANKED" in call(capsys, "compare", str(finished["cosine"]), str(other))[1]


def test_commands_on_something_that_is_no_run(tmp_path: Path, capsys: Captured) -> None:
    """A misspelt run folder would end in a traceback."""
    for command in (["eval"], ["compare"], ["generate", "--prompt", "x"]):
        code, _, err = call(capsys, command[0], str(tmp_path / "nothing"), *command[1:])
        assert (code, "Traceback" in err) == (2, False)
        assert "nothing" in err


@pytest.mark.parametrize(
    "command", ["prepare", "train", "eval", "generate", "compare", "schedule show", "schedule list"]
)
def test_help_fits_the_screen_and_shows_an_example(command: str) -> None:
    """A newcomer would have to scroll, and guess."""
    words = [sys.executable, "-c", f"from llmtrain.cli import main; main({[*command.split(), '--help']!r})"]
    done = subprocess.run(words, capture_output=True, text=True, env={"COLUMNS": "80", "TERM": "dumb", "PATH": ""})
    lines = done.stdout.splitlines()
    assert "Example: llmtrain" in done.stdout
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def edited(prepared: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path]:
    """A config on a private copy of the data, which a test may damage."""
    shutil.copytree(prepared["data"]["path"], folder / "data")
    return {**prepared, "data": {**prepared["data"], "path": str(folder / "data")}}, folder / "data"


def refused(capsys: Captured, config: dict[str, Any], folder: Path, *overrides: str) -> str:
    """What `train` says of a config that it refuses."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    words = [word for text in (f"run.dir={folder / 'run'}", *overrides) for word in ("--set", text)]
    code, _, err = call(capsys, "train", "--config", str(path), *words)
    assert (code, "Traceback" in err) == (2, False)
    assert not (folder / "run" / "metrics.jsonl").exists()
    return err


def test_data_that_is_missing_or_damaged_is_refused_by_name(
    prepared: dict[str, Any], tmp_path: Path, capsys: Captured
) -> None:
    """A run would start on garbage, or fail hours later."""
    config, data = edited(prepared, tmp_path)
    assert "llmtrain prepare --config" in refused(capsys, config, tmp_path, f"data.path={tmp_path / 'nowhere'}")

    shard = next(data.glob("train-*.bin"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert shard.name in refused(capsys, config, tmp_path)
    shard.write_bytes(whole[:32] + bytes(32) + whole[64:])
    assert "tokenizer" in refused(capsys, config, tmp_path)
    shard.unlink()
    assert shard.name in refused(capsys, config, tmp_path)
    shard.write_bytes(whole)

    (data / "tokenizer.model").write_bytes(b"another tokenizer")
    assert "tokenizer.model" in refused(capsys, config, tmp_path)


def test_a_vocabulary_larger_than_the_model_is_refused(
    prepared: dict[str, Any], tmp_path: Path, capsys: Captured
) -> None:
    """An embedding lookup would fail in the middle of training, or wrap around."""
    config, data = edited(prepared, tmp_path)
    config["data"]["tokenizer"] = {"kind": "model", "path": str(data / "tokenizer.model")}
    said = refused(capsys, config, tmp_path, "model.vocab_size=300")
    assert "350" in said
    assert "300" in said
    assert Tokenizer.load(data / "tokenizer.model").vocab_size == 350


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("schedule.nme=cosine", 'did you mean "name"'),
        ("schedule.name=cosin", 'did you mean "cosine"'),
        ("schedule.exponnt=2", 'did you mean "exponent"'),
        ("batch.micro=3", "nearest possible"),
        ("engine.deepspeed={scheduler: {type: WarmupLR}}", "refused"),
        ("validation.sets={other: nowhere}", "nowhere"),
        ("run.stop_at=1", "no unit"),
    ],
)
def test_mistakes_in_the_config(
    prepared: dict[str, Any], tmp_path: Path, capsys: Captured, override: str, words: str
) -> None:
    """A typing error would train something else."""
    assert words in refused(capsys, prepared, tmp_path, override)


def test_single_engine_on_two_ranks_is_refused(leg: Leg) -> None:
    """Two ranks would train two separate models in one folder."""
    running = leg("run", 2, "engine.kind=single")
    assert running.wait() == [2, 2]
    assert running.text().count("error:") == 1
    assert "engine.kind=fsdp" in running.text()
    assert "Traceback" not in running.text()
