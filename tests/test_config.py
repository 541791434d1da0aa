"""The config: what is read, refused, derived and written."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.config import Config
from llmtrain.config_file import apply_override, load_config, parse_yaml, to_yaml, validate
from llmtrain.errors import ConfigError
from llmtrain.presets import PRESETS
from llmtrain.schedules import plan
from llmtrain.trajectory import trajectory_of
from llmtrain.units import Length, parse_batch_tokens

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def values(**changes: Any) -> dict[str, Any]:
    """A whole config as YAML gives it; `section__key=value` changes one field."""
    config: dict[str, Any] = {
        "run": {"name": "test"},
        "model": {"preset": "tiny"},
        "data": {"path": "data/x", "tokenizer": {"kind": "sentencepiece", "vocab_size": 4096}},
        "batch": {"global_sequences": 8, "micro": 2, "seq_len": 256},
        "schedule": {"name": "cosine", "peak": 1e-3, "warmup": "10 steps", "horizon": "100 steps"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        config.setdefault(section, {})[key] = value
    return config


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        validate(values(**changes), "config")
    return str(refused.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    """A user's first command would fail."""
    config = load_config(path)
    assert plan(config.schedule, config.batch.tokens).total_updates == config.total_updates
    assert load_config(path, ["engine.kind=fsdp"]).engine.kind == "fsdp"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_resolved_config_reads_as_itself(path: Path, tmp_path: Path) -> None:
    """The config saved with a run would start another run."""
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config


def test_yaml_traps() -> None:
    """`6e-4` would be a string and a run named `no` would be named False."""
    read = parse_yaml("{a: 6e-4, b: no, c: 1:30, d: 2026-01-01, e: true, f: null, g: 0123, h: 4M, i: on}", "text")
    expected = {"a": 6e-4, "b": "no", "c": "1:30", "d": "2026-01-01", "e": True, "f": None, "g": 123, "h": "4M"}
    assert read == {**expected, "i": "on"}
    with pytest.raises(ConfigError, match='line 2: key "a" is given twice'):
        parse_yaml("a: 1\na: 2", "text")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch__mcro": 2}, ['unknown key "batch.mcro"', 'did you mean "micro"']),
        ({"schedul__x": 1}, ['unknown key "schedul"', 'did you mean "schedule"']),
        ({"model__preset": "lama-7b"}, ['unknown preset "lama-7b"', 'did you mean "llama-7b"']),
        ({"schedule__warmup": 2000}, ["schedule.warmup", '"2000 steps"']),
        ({"schedule__warmup": "200 steps"}, ["longer than", '"100 steps"']),
        ({"schedule__horizon": "10%"}, ["must be in steps or tokens"]),
        ({"batch__global_sequences": 7}, ["7 sequences do not divide", "6 sequences", "8 sequences", "batch.micro 1"]),
        ({"batch__global_tokens": "1K"}, ["exactly one of global_tokens and global_sequences"]),
        ({"batch__seq_len": 1024}, ["batch.seq_len 1024 exceeds model.max_seq_len 512"]),
        ({"model__vocab_size": 1000}, ["data.tokenizer.vocab_size 4096 exceeds model.vocab_size 1000"]),
        ({"model__num_heads": 3}, ["hidden_size 128", "num_heads 3"]),
        ({"engine__deepspeed": {"scheduler": {}}}, ['"scheduler" is refused', "schedule"]),
        ({"run__name": "a b"}, ["run.name"]),
        ({"run__name": False}, ["run.name"]),
        ({"optim__clip": True}, ["optim.clip"]),
        ({"validation__every": "0 steps"}, ["validation.every", "at least one update"]),
        ({"engine__activation_checkpointing": 0}, ["engine.activation_checkpointing"]),
    ],
)
def test_a_mistake_is_answered_with_its_place_and_remedy(changes: dict[str, Any], words: list[str]) -> None:
    """A user would search a traceback, or train something else than was written."""
    message = refusal(**changes)
    for word in words:
        assert word in message


def test_all_mistakes_are_told_at_once() -> None:
    """A user would mend one, queue again, and find the next."""
    message = refusal(batch__mcro=2, optim__clip="x", run__name="?")
    assert all(word in message for word in ("batch.mcro", "optim.clip", "run.name"))


def test_batch_triangle() -> None:
    """The global batch would change with the number of GPUs."""
    config = validate(values(), "config")
    assert [config.batch.accumulation(world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match=r"micro-batches of 2 on 3 ranks.*6 sequences.*12 sequences"):
        config.batch.accumulation(3)


def test_batch_tokens_are_named_in_powers_of_two() -> None:
    """LLaMA's 4M-token batch of 2048-token sequences would not be a whole number of them."""
    assert parse_batch_tokens("4M") == 4194304 == 2048 * 2048
    assert (parse_batch_tokens("512K"), parse_batch_tokens(4096)) == (524288, 4096)
    with pytest.raises(ValueError, match="not a number of tokens"):
        parse_batch_tokens("4.0001M")
    message = refusal(batch__global_sequences=None, batch__global_tokens=1000)
    assert "the nearest possible are 768 or 1024" in message


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
        ("8B tokens", 8_000_000_000, "tokens"),
        ("1.5M tokens", 1_500_000, "tokens"),
        ("1_000 steps", 1000, "steps"),
        ("1e3 steps", 1000, "steps"),
        ("1%", 1, "percent"),
        ("0.5 %", 0.5, "percent"),
        ("auto", 0, "auto"),
        (0, 0, "steps"),
    ],
)
def test_lengths(text: object, value: float, unit: str) -> None:
    """`1` could be one step or the whole run."""
    length = Length.parse(text)
    assert (length.value, length.unit) == (value, unit)
    assert Length.parse(str(length)) == length


@pytest.mark.parametrize(
    "text", [1, 0.1, "100", "1.5 steps", "ten steps", "101%", "-1 steps", None, True, "4 epochs", "1e999999999 steps"]
)
def test_a_length_without_a_clear_meaning_is_refused(text: object) -> None:
    """A fraction would be taken for a count, or a count for a fraction."""
    with pytest.raises(ValueError, match=r"write|not a|outside"):
        Length.parse(text)


def test_lengths_in_updates() -> None:
    """A length in tokens would end before the tokens are seen."""
    assert Length.parse("1000 tokens").updates(300) == 4
    assert Length.parse("0.1%").updates(1, 1000) == 1
    assert Length.parse("29%").updates(1, 100) == 29


def test_the_horizon_is_not_the_stop() -> None:
    """A short trial of a long run would bend its learning rate."""
    config = validate(values(run__stop_at="30 steps"), "config")
    assert (config.last_update, config.total_updates) == (30, 100)


def test_the_trajectory_knows_what_shapes_the_loss() -> None:
    """A run would be resumed as another one, or not be resumed on other hardware."""
    base = trajectory_of(validate(values(), "config"), "data")
    same = {"engine__kind": "fsdp", "batch__micro": 4, "validation__every": "5 steps", "schedule__peak": 1.0}
    for name, value in same.items():
        assert trajectory_of(validate(values(**{name: value}), "config"), "data") == base
    other = {"run__seed": 1, "optim__clip": 0.5, "engine__precision": "fp32", "model__norm_eps": 1e-6}
    for name, value in other.items():
        assert trajectory_of(validate(values(**{name: value}), "config"), "data") != base
    assert trajectory_of(validate(values(), "config"), "other data") != base


def test_overrides() -> None:
    """`--set` would write into the wrong place, or make numbers into text."""
    raw = values()
    for text in ("optim.lr_scale=6e-4", "run.name=no", "engine.kind=fsdp", "data.source={kind: stdlib}"):
        apply_override(raw, text)
    assert raw["optim"]["lr_scale"] == 6e-4
    assert (raw["run"]["name"], raw["engine"], raw["data"]["source"]) == ("no", {"kind": "fsdp"}, {"kind": "stdlib"})
    for text in ("optim.clip", "=1", "run.name.first=1", "a..b=1"):
        with pytest.raises(ConfigError, match="--set"):
            apply_override(raw, text)


def test_a_missing_config_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt path would end in a traceback."""
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(values()))
    with pytest.raises(ConfigError, match=r'did you mean "demo\.yaml"'):
        load_config(tmp_path / "demmo.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_presets_are_models() -> None:
    """A preset would be refused as soon as it is used."""
    for name in PRESETS:
        vocab = PRESETS[name]["vocab_size"]
        config = Config.model_validate(values(model__preset=name, data__tokenizer={"kind": "model", "path": "x"}))
        assert config.model.vocab_size == vocab
