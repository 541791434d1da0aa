"""Schedules as one HTML file that needs no network: hover for a number, click a name to hide it, switch the axes."""

import html
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.errors import EnvironmentError
from llmtrain.schedules.exact import IntArray
from llmtrain.study.schedule_figure import PALETTE, areas, key_numbers, lower_panel, shares, subtitle, title
from llmtrain.study.schedule_shown import Shown, drawn_updates, shared_tokens
from llmtrain.study.schedule_view import NOTES, numbers, warnings


def write_html(shown: Sequence[Shown], path: Path) -> None:
    """Write the page. Raises EnvironmentError where plotly, which holds the script that draws, is not installed."""
    try:
        script = importlib.import_module("plotly.offline").get_plotlyjs()
    except ImportError as error:
        raise EnvironmentError(f"--html draws with plotly ({error}): pip install 'llmtrain[plots]'") from None
    data = json.dumps(page_data(shown), allow_nan=False).replace("<", "\\u003c")
    filled = {
        "TITLE": html.escape(title(shown)),
        "SUBTITLE": html.escape(subtitle(shown)),
        "WARNINGS": "".join(f"<li>{html.escape(text)}</li>" for text in warnings(shown)),
        "TABLE": _table(shown),
        "NOTES": html.escape(" ".join(NOTES)),
        "DATA": data,
        "PLOTLY": script,
    }
    page = re.sub(r"@([A-Z]+)@", lambda place: filled[place[1]], _PAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def page_data(shown: Sequence[Shown]) -> dict[str, Any]:
    """What the script draws. Learning rates keep every digit, the lower panel six."""
    updates = drawn_updates(shown)
    return {
        "updates": updates.tolist(),
        "tokens": shared_tokens(shown),
        "shares_title": lower_panel(shown),
        "has_shares": any(one.weight_decay > 0 for one in shown),
        "stops": sorted({one.summary.updates for one in shown if one.summary.updates < one.updates}),
        "schedules": [_curves(one, updates, index) for index, one in enumerate(shown)],
    }


def _curves(one: Shown, updates: IntArray, index: int) -> dict[str, Any]:
    own = updates[updates <= one.updates]
    numbered = dict(key_numbers(one))
    return {
        "name": one.label,
        "key": f"mean {numbered['mean multiplier']}, bound {numbered.get('convex bound', '-')}",
        "color": PALETTE[index % len(PALETTE)],
        "dash": "solid" if index < len(PALETTE) else "dash",
        "lr": one.lrs()[own - 1].tolist(),
        "multiplier": _six_digits(one.schedule.multipliers(own)),
        "shares": _six_digits(shares(one)[own[own <= one.summary.updates] - 1]),
        "area": _six_digits(areas(one)[own - 1]),
    }


def _six_digits(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in np.asarray(values).tolist()]


def _table(shown: Sequence[Shown]) -> str:
    found = [numbers(one) for one in shown]
    heads = "".join(
        f'<th scope="col"><i style="background:{PALETTE[i % len(PALETTE)]}"></i>{html.escape(one.label)}</th>'
        for i, one in enumerate(shown)
    )
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>' + "".join(f"<td>{one[name]}</td>" for one in found) + "</tr>"
        for name in found[0]
    )
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<link rel="icon" href="data:,">
<style>
body { margin: 0 auto; max-width: 1240px; padding: 28px 32px 48px; color: #222; background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 29px; letter-spacing: -.01em; }
.subtitle { margin: 4px 0 18px; color: #666; white-space: pre-wrap; }
.bar { display: flex; flex-wrap: wrap; gap: 8px 28px; margin-bottom: 4px; color: #666; }
.bar button { font: inherit; color: #333; background: #f3f3f3; border: 1px solid #d4d4d4; padding: 2px 12px;
              cursor: pointer; }
.bar button + button { border-left: 0; }
.bar button:first-of-type { border-radius: 6px 0 0 6px; margin-left: 8px; }
.bar button:last-of-type { border-radius: 0 6px 6px 0; }
.bar button[aria-pressed=true] { background: #222; border-color: #222; color: #fff; }
#plot { height: 640px; }
table { border-collapse: collapse; margin-top: 20px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 16px 3px 0; text-align: right; border-bottom: 1px solid #eaeaea; font-weight: 400; }
tbody th { text-align: left; color: #666; padding-right: 28px; }
thead th { font-weight: 600; }
thead i { display: inline-block; width: 14px; height: 4px; margin: 0 7px 4px 0; border-radius: 2px; }
.warnings { margin: 14px 0 0; padding: 0; list-style: none; color: #a33c00; }
.notes { max-width: 78ch; color: #666; font-size: 13.5px; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<p class="subtitle">@SUBTITLE@</p>
<div class="bar">
  <span>learning rate<button data-switch="scale" data-to="linear">linear</button><button
    data-switch="scale" data-to="log">log</button></span>
  <span id="below">lower panel<button data-switch="below" data-to="shares">EMA coefficients</button><button
    data-switch="below" data-to="area">area so far</button></span>
  <span id="across">across<button data-switch="across" data-to="updates">updates</button><button
    data-switch="across" data-to="tokens">tokens</button></span>
</div>
<div id="plot"></div>
<ul class="warnings">@WARNINGS@</ul>
@TABLE@
<p class="notes">@NOTES@</p>
<script type="application/json" id="data">@DATA@</script>
<script>@PLOTLY@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const state = {scale: "linear", below: data.has_shares ? "shares" : "area", across: "updates"};
const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
const faint = "#6b6b6b", grid = "#e8e8e8";

function traces() {
  const x = state.across === "tokens" ? data.updates.map(k => k * data.tokens) : data.updates;
  const upper = data.schedules.map(s => ({
    x: x.slice(0, s.lr.length), y: s.lr, name: `<b>${escaped(s.name)}</b><br>${s.key}`, legendgroup: s.name,
    customdata: s.multiplier.map((m, i) => [m, data.updates[i]]), mode: "lines",
    line: {color: s.color, width: 2.6, dash: s.dash, simplify: false},
    hovertemplate: `${escaped(s.name)}  <b>%{y:.6~g}</b>  (%{customdata[0]:.4~g} of its peak)<extra></extra>`,
  }));
  const lower = data.schedules.map(s => ({
    x: x.slice(0, s[state.below].length), y: s[state.below], name: s.name, legendgroup: s.name, showlegend: false,
    mode: "lines", yaxis: "y2", line: {color: s.color, width: 2.2, dash: s.dash, simplify: false},
    hovertemplate: `${escaped(s.name)}  <b>%{y:.4~g}</b><extra></extra>`,
  }));
  return upper.concat(lower);
}

function heading(text, y) {
  return {text, xref: "paper", yref: "paper", x: 0, y, xanchor: "left", yanchor: "bottom", showarrow: false,
          font: {size: 15, color: "#222"}};
}

function layout() {
  const below = state.below === "shares" ? data.shares_title : "Area under the curve so far, in updates at the peak";
  const unit = state.across === "tokens" ? data.tokens : 1;
  const axis = {gridcolor: grid, zeroline: false, tickfont: {color: faint}, rangemode: "tozero"};
  return {
    font: {family: 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif', size: 14},
    margin: {l: 72, r: 16, t: 36, b: 48}, hovermode: "x unified", hoverlabel: {font: {size: 14}, bordercolor: "#ccc"},
    xaxis: {title: {text: state.across === "tokens" ? "tokens" : "update", font: {color: faint, size: 14}},
            tickfont: {color: faint}, showgrid: false, zeroline: false, showline: true, linecolor: "#b0b0b0",
            anchor: "y2", rangemode: "tozero", hoverformat: ",d",
            ...(state.across === "tokens" ? {exponentformat: "B"} : {tickformat: ",d"}),
            unifiedhovertitle: {text: state.across === "tokens" ? "%{x:,d} tokens" : "update %{x:,d}"}},
    yaxis: {...axis, domain: [0.4, 1], type: state.scale, exponentformat: "e",
            ...(state.scale === "log" ? {dtick: 1} : {})},
    yaxis2: {...axis, domain: [0, 0.31], exponentformat: "none", separatethousands: true},
    annotations: [heading("Learning rate", 1.01), heading(escaped(below), 0.32)],
    shapes: data.stops.map(k => ({type: "line", x0: k * unit, x1: k * unit, yref: "paper", y0: 0, y1: 1,
                                  line: {color: faint, width: 1, dash: "dot"}, label: {text: "the run ends"}})),
    legend: {x: 1.01, y: 1, tracegroupgap: 10, groupclick: "togglegroup"},
  };
}

function draw() {
  for (const button of document.querySelectorAll("button[data-switch]"))
    button.setAttribute("aria-pressed", state[button.dataset.switch] === button.dataset.to);
  const hidden = (document.getElementById("plot").data || []).map(trace => trace.visible);
  const drawn = traces().map((trace, i) => hidden[i] === undefined ? trace : {...trace, visible: hidden[i]});
  return Plotly.react("plot", drawn, layout(), {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: {filename: "schedules", scale: 2},
  });
}

document.getElementById("below").hidden = !data.has_shares;
document.getElementById("across").hidden = data.tokens === null;
document.addEventListener("click", event => {
  const wanted = event.target.dataset;
  if (wanted && wanted.switch) { state[wanted.switch] = wanted.to; draw(); }
});
draw();
</script>
</body>
</html>
"""
