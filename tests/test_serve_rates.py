"""The service answers what the library computes, for every schedule, and refuses what the library refuses."""

import json
import os
import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest

from llmtrain.config import ScheduleConfig
from llmtrain.config_file import read_section
from llmtrain.errors import LlmtrainError
from llmtrain.schedules import catalog, plan
from llmtrain.schedules.conventions import CONVENTIONS
from llmtrain.schedules.given import read_knots, read_norms, read_pieces
from llmtrain.schedules.registry import Shape, read_length, read_lengths
from llmtrain.schedules.summary import summarize
from llmtrain.schedules.warmups import WARMUPS
from llmtrain.serve import answers
from llmtrain.serve.asked import read_json
from llmtrain.serve.catalogue import all_schedules, example
from llmtrain.serve.refusals import Refusal

SPECS = 1000 if os.environ.get("LLMTRAIN_FULL") else 60
OWN_WARMUP = ("piecewise", "refined", "one_cycle")


def length(draw: random.Random, most: float = 100) -> str:
    """A length as people write it."""
    return draw.choice([f"{draw.uniform(0, most):.3g}%", f"{draw.randint(1, int(most * 50))} steps"])


def value(draw: random.Random, hint: Any) -> Any:
    """A value for one parameter, often one that fits."""
    reader = get_args(hint)[1] if get_origin(hint) is Annotated else None
    if reader is read_length:
        return length(draw, 40)
    if reader is read_lengths:
        return sorted(f"{share:05.2f}%" for share in (draw.uniform(30, 95) for _ in range(2)))
    if reader is read_knots:
        places = sorted(draw.sample(range(0, 100), draw.randint(1, 6)))
        return [[f"{place}%", draw.random()] for place in places]
    if reader is read_norms:
        return [draw.uniform(0.1, 5) for _ in range(draw.randint(2, 40))]
    if reader is read_pieces:
        middle = draw.choice(["linear", "cosine", "hybrid"])
        return [{"name": "constant", "length": f"{draw.randint(5, 60)}%"}, {"name": middle, "end": draw.random()}]
    if get_origin(hint) is Literal:
        return draw.choice(get_args(hint))
    if get_origin(hint) is list:
        return sorted((value(draw, get_args(hint)[0]) for _ in range(2)), reverse=True)
    return draw.randint(1, 6) if hint is int else draw.choice([draw.random(), draw.uniform(0.05, 2)])


def config(draw: random.Random, shape: Shape) -> dict[str, Any]:
    """A config of this shape; most can be planned."""
    written: dict[str, Any] = {
        "name": shape.name,
        "peak": 10 ** draw.uniform(-6, 0),
        "floor": draw.choice([0, 0.1, draw.random()]),
    }
    written["horizon"] = draw.choice([f"{draw.randint(300, 10**6)} steps", f"{draw.randint(2, 900)}M tokens"])
    if shape.name not in OWN_WARMUP:
        written["warmup"] = draw.choice(["auto", 0, f"{draw.uniform(0, 4):.2g}%", f"{draw.randint(0, 20)} steps"])
    if draw.random() < 0.3:
        written["warmup_shape"] = draw.choice(WARMUPS)
        written["warmup_start"] = draw.choice([0.0, 0.01, draw.random()])
    if draw.random() < 0.2:
        written["convention"] = draw.choice(list(CONVENTIONS))
    for name, parameter in shape.parameters.items():
        if parameter.required or draw.random() < 0.6:
            written[name] = value(draw, parameter.hint)
    return written


def specs(shape: Shape) -> Iterator[tuple[random.Random, dict[str, Any]]]:
    draw = random.Random(shape.name)
    while True:
        yield draw, config(draw, shape)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # before a plan is refused
@pytest.mark.parametrize("shape", catalog(), ids=lambda shape: shape.name)
def test_answers_are_the_librarys(shape: Shape) -> None:
    """A loop that asks the service would train on another curve than one that asks the library."""
    compared, refused = 0, 0
    for draw, written in specs(shape):
        batch, beta2 = draw.randint(1, 2**22), draw.choice([0.95, 0.999])
        asked = {"config": written, "tokens_per_update": batch, "beta2": beta2}
        try:
            schedule = plan(read_section(ScheduleConfig, written, "schedule"), batch, beta2)
        except LlmtrainError:
            with pytest.raises(Refusal):
                answers.lr_schedule({**asked, "step": 1})
            refused += 1
            assert refused < 20 * SPECS, written
            continue
        last = schedule.total_updates
        steps = [0, 1, max(1, last), last + 7, *(draw.randint(0, last + 5) for _ in range(12))]
        body = json.dumps({**asked, "steps": steps}).encode()
        answer = json.loads(answers.lr_schedule(read_json(body)))
        assert answer["learning_rate"] == (schedule.peak * schedule.multipliers(np.array(steps))).tolist(), written
        assert answer["steps"] == steps
        one = json.loads(answers.lr_schedule(read_json(json.dumps({**asked, "step": steps[-1]}).encode())))
        assert one == {"learning_rate": schedule.lr(steps[-1]), "step": steps[-1], "hash": schedule.hash}
        assert answer["hash"] == schedule.hash
        compared += 1
        if compared == SPECS:
            return


def test_a_range_is_its_updates() -> None:
    """A curve would be drawn over other updates than the ones asked for."""
    asked = {"config": example("cosine"), "range": {"start": 5, "stop": 26, "stride": 10}}
    answer = json.loads(answers.lr_schedule(asked))
    listed = json.loads(answers.lr_schedule({"config": example("cosine"), "steps": [5, 15, 25]}))
    assert answer == listed
    assert json.loads(answers.lr_schedule({"config": example("cosine"), "range": {"stop": 3}}))["steps"] == [1, 2, 3]


@pytest.mark.parametrize("entry", all_schedules()["schedules"], ids=lambda entry: entry["name"])
def test_listed_schedules_can_be_asked_for(entry: dict[str, Any]) -> None:
    """Who takes an example from the list would get an error, and who fills in the defaults another curve."""
    bare = json.loads(answers.validate({"config": entry["example"]}))
    assert bare["valid"], bare
    defaults = {name: p["default"] for name, p in entry["parameters"].items() if not p["required"]}
    assert json.loads(answers.validate({"config": {**defaults, **entry["example"]}}))["hash"] == bare["hash"]
    assert set(entry["parameters"]) < set(entry["schema"]["properties"])


def test_a_comparison_has_the_numbers_of_the_command() -> None:
    """The page would show other numbers than `llmtrain schedule show`."""
    configs = [example("cosine"), {**example("wsd"), "convention": "llmtrain"}]
    asked = {"configs": configs, "conventions": ["hf", "nanogpt"], "weight_decay": 0.05, "points": 100}
    found = json.loads(answers.compare(asked))["schedules"]
    for written, one in zip(configs, found, strict=True):
        schedule = plan(ScheduleConfig.model_validate(written), 1)
        numbers = summarize(schedule, 0.05)
        assert one["hash"] == schedule.hash
        assert one["summary"]["area"] == numbers.area
        assert one["summary"]["bound_ratio"] == numbers.bound_ratio
        assert one["summary"]["warnings"] == list(numbers.warnings)
        assert one["learning_rate"] == (schedule.peak * schedule.multipliers(one["updates"])).tolist()
        other = plan(ScheduleConfig.model_validate({**written, "convention": "hf"}), 1)
        overlay = one["conventions"]["hf"]
        assert overlay["learning_rate"] == (other.peak * other.multipliers(one["updates"])).tolist()
        assert overlay["hash"] == other.hash
    assert "has no schedule wsd" in found[1]["conventions"]["nanogpt"]["error"]
    assert [one["label"] for one in found] == ["cosine", "wsd"]


def test_every_fault_is_named() -> None:
    """A user would mend one field, ask again, and meet the next fault."""
    answer = json.loads(answers.validate({"config": {"name": "cosine", "peak": -1, "warmup": 2000, "floor": 2}}))
    assert not answer["valid"]
    assert {error["field"] for error in answer["errors"]} == {
        "config.peak",
        "config.warmup",
        "config.floor",
        "config.horizon",
    }
    misspelt = json.loads(answers.validate({"config": {**example("wsd"), "decya": "10%"}}))
    assert "decay" in misspelt["errors"][0]["message"]
    assert misspelt["errors"][0]["field"] == "config.decya"


def test_tokens_need_a_batch() -> None:
    """A batch that nobody wrote would decide where the curve ends."""
    written = {"name": "linear", "peak": 1e-3, "horizon": "8B tokens"}
    with pytest.raises(Refusal) as refused:
        answers.lr_schedule({"config": written, "step": 1})
    assert refused.value.problems[0].field == "tokens_per_update"
    assert json.loads(answers.lr_schedule({"config": written, "step": 1, "tokens_per_update": "4M"}))["learning_rate"]
