"""How does a schedule change under one's hands, in a notebook?

    from llmtrain.study.notebook import explore
    explore("cosine", "wsd:decay=10%", horizon="50000 steps")

draws the curves over sliders for everything that has a number, and the table of `llmtrain schedule show` below. Every
number is the one that command prints. What a slider cannot hold (knots, pieces, lists) stays as the name has it.
"""

import html
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from llmtrain.errors import EnvironmentError, LlmtrainError
from llmtrain.schedules.registry import Parameter, read_length, shape_named
from llmtrain.study.schedule_figure import PALETTE
from llmtrain.study.schedule_shown import Shown, drawn_updates, look_at
from llmtrain.study.schedule_view import table, warnings
from llmtrain.units import Length

_PLOTLY_MIME = "application/vnd.plotly.v1+json"
_UNITS = {"percent": "%", "steps": " steps"}
_LAYOUT = {
    "template": "plotly_white",
    "height": 380,
    "margin": {"l": 70, "r": 10, "t": 20, "b": 40},
    "hovermode": "x unified",
    "xaxis": {"title": {"text": "update"}, "rangemode": "tozero"},
    "yaxis": {"title": {"text": "learning rate"}, "rangemode": "tozero", "exponentformat": "e"},
}


@dataclass(frozen=True)
class Explorer:
    """What `explore` shows: a cell that ends with one displays it.

    `controls` has a widget for each of peak, warmup, horizon and floor, and for `wsd.decay` and the like; setting its
    `value` in code does what moving it does. `figure` is the plotly figure as it is now.
    """

    controls: dict[str, Any]
    figure: Any
    view: Any

    def _repr_mimebundle_(self, **asked: Any) -> Any:
        return self.view._repr_mimebundle_(**asked)


@dataclass(frozen=True)
class _Control:
    """A widget, and the unit of its value."""

    widget: Any
    unit: str = ""

    @property
    def word(self) -> str:
        """The value as a config writes it."""
        return f"{self.widget.value}{self.unit}"


@dataclass(frozen=True)
class _Named:
    """A schedule as it was named, with controls for some of its parameters."""

    shape: str
    words: dict[str, str]
    controls: dict[str, _Control]
    usual: dict[str, str]  # what the controls say where nothing is written

    @property
    def item(self) -> str:
        """The name with what the controls say now."""
        moved = {
            key: one.word for key, one in self.controls.items() if key in self.words or one.word != self.usual[key]
        }
        return ":".join([self.shape, *(f"{key}={word}" for key, word in {**self.words, **moved}.items())])


def explore(
    *names: str,
    peak: float = 3e-4,
    warmup: str = "1%",
    horizon: str = "10000 steps",
    floor: float = 0.0,
    tokens_per_update: str | None = None,
    weight_decay: float = 0.1,
) -> Explorer:
    """Sliders over schedules, named as for `llmtrain schedule show`: `wsd`, or `wsd:decay=10%`.

    Raises EnvironmentError where ipywidgets or plotly is not installed, and what `look_at` raises for a wrong name.
    """
    widgets, plotly = _imported("ipywidgets"), _imported("plotly.graph_objects")
    asked = names or ("cosine", "linear", "wsd")
    words = [f"peak={peak}", f"warmup={warmup}", f"horizon={horizon}", f"floor={floor}"]
    look_at(asked, (), words, tokens_per_update, weight_decay)
    shared = {
        "peak": _Control(widgets.FloatLogSlider(value=peak, min=-6, max=-1, step=0.01, readout_format=".3g")),
        "warmup": _length_control(widgets, warmup),
        "horizon": _length_control(widgets, horizon),
        "floor": _Control(widgets.FloatSlider(value=floor, min=0, max=1, step=0.01)),
    }
    named = [_read(widgets, name) for name in asked]
    controls = {**{key: one.widget for key, one in shared.items()}, **_own(named)}
    figure = plotly.Figure(layout=_LAYOUT)
    plot, numbers = widgets.Output(), widgets.HTML()

    def draw(_: object = None) -> None:
        words = [f"{key}={one.word}" for key, one in shared.items()]
        try:
            shown = look_at([one.item for one in named], (), words, tokens_per_update, weight_decay)
        except LlmtrainError as error:
            numbers.value = _text(str(error))
            return
        _redraw(plotly, figure, shown)
        bundle = {_PLOTLY_MIME: figure.to_plotly_json(), "text/plain": "learning rates"}
        plot.outputs = ({"output_type": "display_data", "data": bundle, "metadata": {}},)
        numbers.value = _text("\n".join([table(shown), *warnings(shown)]))

    for key, widget in controls.items():
        widget.description = key
        widget.style.description_width = "9em"
        widget.observe(draw, names="value")
    draw()
    return Explorer(controls, figure, widgets.VBox([plot, *controls.values(), numbers]))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise EnvironmentError(f"explore() needs {package} ({error}): pip install {package}") from None


def _read(widgets: Any, name: str) -> _Named:
    shape, *written = name.split(":")
    words = {key.strip(): word.strip() for key, _, word in (text.partition("=") for text in written)}
    controls = {}
    for key, parameter in shape_named(shape).parameters.items():
        control = _control(widgets, parameter, words.get(key, parameter.default))
        if control is not None:
            controls[key] = control
    return _Named(shape, words, controls, {key: one.word for key, one in controls.items()})


def _own(named: Sequence[_Named]) -> dict[str, Any]:
    """The widgets of all schedules by `shape.parameter`, numbered where a shape comes twice."""
    shapes = [one.shape for one in named]
    labels = [
        f"{one.shape} {index + 1}" if shapes.count(one.shape) > 1 else one.shape for index, one in enumerate(named)
    ]
    return {
        f"{label}.{key}": control.widget
        for label, one in zip(labels, named, strict=True)
        for key, control in one.controls.items()
    }


def _control(widgets: Any, parameter: Parameter, value: Any) -> _Control | None:
    """A control that fits the parameter's type, or None."""
    if get_origin(parameter.hint) is Literal:
        return _Control(widgets.Dropdown(options=get_args(parameter.hint), value=value))
    if parameter.hint is float:
        number = float(value)
        most = 1 if 0 < number < 1 else 4 * max(1, number)
        return _Control(widgets.FloatSlider(value=number, min=min(0, number), max=most, step=0.01))
    if parameter.hint is int:
        return _Control(widgets.IntSlider(value=int(value), min=1, max=max(10, 4 * int(value))))
    if read_length in get_args(parameter.hint):
        return _length_control(widgets, value)
    return None


def _length_control(widgets: Any, written: str) -> _Control:
    """A slider in the unit that is written; text where that is none to slide in."""
    length = Length.parse(written)
    if length.unit == "percent":
        return _Control(widgets.FloatSlider(value=length.value, min=0, max=100, step=0.1), _UNITS["percent"])
    if length.unit == "steps":
        most = 4 * max(250, int(length.value))
        return _Control(widgets.IntSlider(value=int(length.value), min=0, max=most), _UNITS["steps"])
    return _Control(widgets.Text(value=str(written)))


def _text(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _redraw(plotly: Any, figure: Any, shown: Sequence[Shown]) -> None:
    """Every rate as `look_at` has it; the figure stays the same object."""
    updates = drawn_updates(shown)
    traces = []
    for index, one in enumerate(shown):
        own = updates[updates <= one.updates]
        line = {"color": PALETTE[index % len(PALETTE)], "width": 2.4}
        traces.append(
            plotly.Scatter(x=own.tolist(), y=one.lrs()[own - 1].tolist(), name=one.label, mode="lines", line=line)
        )
    figure.data = ()
    figure.add_traces(traces)
