"""Sliders in a notebook show the rates that training uses."""

import subprocess
import sys
from typing import Any

import pytest

from llmtrain.config import ScheduleConfig
from llmtrain.errors import LlmtrainError
from llmtrain.schedules import catalog, plan
from llmtrain.schedules.summary import summarize
from llmtrain.study.notebook import Explorer, explore

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")


def same(explorer: Explorer, *configs: dict[str, Any]) -> None:
    """The figure, what the notebook shows of it, and the table have the library's numbers."""
    bundle = explorer.view.children[0].outputs[0]["data"]["application/vnd.plotly.v1+json"]["data"]
    table = explorer.view.children[-1].value
    assert len(explorer.figure.data) == len(bundle) == len(configs)
    for trace, sent, config in zip(explorer.figure.data, bundle, configs, strict=True):
        schedule = plan(ScheduleConfig.model_validate(config), 1)
        assert list(trace.y) == (schedule.peak * schedule.multipliers(list(trace.x))).tolist() == list(sent["y"])
        assert {1, 2, 3, schedule.total_updates} <= set(trace.x)
        assert f"{summarize(schedule).area:.6g}" in table


USUAL = {"peak": 3e-4, "warmup": "1%", "horizon": "10000 steps", "floor": 0.0}


def test_a_moved_slider_moves_the_curve() -> None:
    """A talk or a notebook would show a curve that no run has."""
    explorer = explore("cosine", "wsd:decay=10%", "wsd:decay=30%")
    own = [{"name": "cosine"}, {"name": "wsd", "decay": "10%"}, {"name": "wsd", "decay": "30%"}]
    same(explorer, *({**USUAL, **one} for one in own))
    explorer.controls["peak"].value = 1e-3
    explorer.controls["warmup"].value = 2.5
    explorer.controls["horizon"].value = 12345
    explorer.controls["floor"].value = 0.05
    moved = {"peak": explorer.controls["peak"].value, "warmup": "2.5%", "horizon": "12345 steps", "floor": 0.05}
    same(explorer, *({**moved, **one} for one in own))
    explorer.controls["wsd 3.decay"].value = 55
    explorer.controls["wsd 2.cooldown"].value = "1-sqrt"
    explorer.controls["cosine.theta"].value = 1.5
    own = [{"name": "cosine", "theta": 1.5}, {**own[1], "cooldown": "1-sqrt"}, {"name": "wsd", "decay": "55%"}]
    same(explorer, *({**moved, **one} for one in own))


@pytest.mark.parametrize(
    "shape",
    [one for one in catalog() if not any(p.required for p in one.parameters.values())],
    ids=lambda one: one.name,
)
def test_every_schedule_can_be_explored(shape: Any) -> None:
    """A schedule of the registry would not open, or its untouched sliders would change it."""
    explorer = explore(shape.name, warmup="0 steps", floor=0.1)
    same(explorer, {**USUAL, "name": shape.name, "warmup": "0 steps", "floor": 0.1})


def test_a_wrong_value_is_explained_and_the_curve_stays() -> None:
    """A slider moved too far would end in a traceback."""
    explorer = explore("linear", warmup="100 steps", horizon="300 steps")
    before = explorer.figure.to_json()
    explorer.controls["horizon"].value = 50
    assert "warmup" in explorer.view.children[-1].value
    assert explorer.figure.to_json() == before
    explorer.controls["horizon"].value = 400
    same(explorer, {**USUAL, "name": "linear", "warmup": "100 steps", "horizon": "400 steps"})


def test_a_wrong_name_is_refused_at_once() -> None:
    """A misspelt name would show an empty cell."""
    with pytest.raises(LlmtrainError, match="cosine"):
        explore("cosin")


def test_a_cell_shows_it() -> None:
    """The cell that ends with explore() would show a line of text."""
    bundle = explore("constant")._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_no_torch_is_loaded() -> None:
    """A notebook on a login node would take seconds to open."""
    code = "import sys, llmtrain.study.notebook as one; one.explore('wsd'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
