"""Which shapes are drawn from numbers the user brings: knots, a pilot run's gradient norms, or other shapes in a row?

Files are read once, when the config is planned; what they hold goes into the spec, so the schedule stays one function.
"""

import csv
import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from llmtrain.errors import ScheduleError, did_you_mean
from llmtrain.schedules.clock import Scale
from llmtrain.schedules.exact import FloatArray, interpolate
from llmtrain.schedules.phases import no_warmup, wanted_level
from llmtrain.schedules.registry import Progress, read_parameters, read_plain, register_schedule, shape_named

_BLOCKS = 1000  # gradient norms kept in a spec: medians of as many equal blocks
_PIECE_KEYS = ("name", "length", "start", "end")


def read_knots(where: str, written: object, scale: Scale) -> list[list[float]]:
    """[["0%", 0], ["1%", 1.0], ["100%", 0]], or a CSV file: `update`, `tokens` or `percent`, and `multiplier`."""
    if isinstance(written, str):
        written = _knots_of_file(where, Path(written).expanduser())
    if not isinstance(written, list | tuple) or not written or not all(_is_pair(knot) for knot in written):
        raise ScheduleError(f'{where} is {written!r:.80}, wanted pairs such as ["10%", 1.0], or the name of a CSV file')
    knots = [[scale.read(where, place), read_plain(where, level, float)] for place, level in written]
    for (before, _), (after, _) in pairwise(knots):
        if after <= before:
            raise ScheduleError(f"{where}: the places of the knots must rise, found {before} before {after}")
    for _, level in knots:
        wanted_level("knots", level)
    return knots


def read_norms(where: str, written: object, scale: Scale) -> list[float]:
    """Gradient norms in order: a list, a CSV file or a JSON-lines file (metrics.jsonl) with a `grad_norm` column."""
    norms = _norms_of_file(where, Path(written).expanduser()) if isinstance(written, str) else written
    norms = read_plain(where, norms, list[float])
    if len(norms) < 2 or min(norms) <= 0:
        raise ScheduleError(f"{where}: wanted at least two gradient norms, all above 0")
    blocks = np.array_split(np.asarray(norms), min(len(norms), _BLOCKS))
    return [float(np.median(block)) for block in blocks]


def read_pieces(where: str, written: object, scale: Scale) -> list[dict[str, Any]]:
    """Mappings with `name`, `length` (the last one takes the rest), `start`, `end`, and the shape's own parameters."""
    if not isinstance(written, list) or not written or not all(isinstance(piece, dict) for piece in written):
        raise ScheduleError(f"{where} is {written!r:.80}, wanted a list of mappings, each with a name")
    left = scale.horizon - scale.warmup
    level = 1.0
    pieces = []
    for i, piece in enumerate(written):
        here, last = f"{where}[{i}]", i == len(written) - 1
        shape = shape_named(str(piece.get("name")))
        if "length" not in piece and not last:
            raise ScheduleError(f"{here}: {shape.name} needs a length; only the last piece takes the rest")
        length = scale.read(f"{here}.length", piece["length"]) if "length" in piece else left
        own = {key: value for key, value in piece.items() if key not in _PIECE_KEYS}
        start = read_plain(f"{here}.start", piece.get("start", level), float)
        level = start if shape.name == "constant" else read_plain(f"{here}.end", piece.get("end", 0.0), float)
        wanted_level("start", start)
        wanted_level("end", level)
        if (shape.absolute and not start >= level < 1) or (shape.absolute and start == 0):
            raise ScheduleError(
                f"{here}: {shape.name} falls, so its start {start:g} must be above 0 and its end {level:g}"
            )
        left -= length
        if length < 1 or left < 0 or (last and left):
            raise ScheduleError(
                f"{where}: the lengths must together be the run after its warm-up; piece {i} is {length}"
            )
        inside = Scale(scale.unit, scale.horizon, 0, scale.tokens_per_update)
        parameters = read_parameters(shape, own, inside, here)
        pieces.append(
            {
                "name": shape.name,
                "version": shape.version,
                "length": length,
                "start": start,
                "end": level,
                "shape": parameters,
            }
        )
    return pieces


Knots = Annotated[Any, read_knots]
Norms = Annotated[Any, read_norms]
Pieces = Annotated[Any, read_pieces]


@register_schedule("piecewise", cyclic=True, ends="level")
def piecewise(at: Progress, *, knots: Knots, between: Literal["linear", "hold"] = "linear") -> FloatArray:
    """g through the knots (p, level): straight lines between them, or each level held until the next knot.

    knots: pairs of a length from the start of the run and a multiplier 0 to 1, or a CSV file (`read_knots`). The knots
    draw the warm-up too; outside of them their first and last levels hold. between: linear or hold.
    """
    no_warmup(at, "piecewise")
    return interpolate(at.t, [place for place, _ in knots], [level for _, level in knots], between == "hold")


@register_schedule("refined", cyclic=True, ends="level")
def refined(
    at: Progress, *, norms: Norms, optimizer: Literal["adam", "sgd"] = "adam", smooth: float = 0.1
) -> FloatArray:
    """g(x) ~ w(x) * integral of w from x to 1, with w = 1/G (adam) or 1/G**2 (sgd); its largest value is 1.

    Defazio 2023, arXiv:2310.07831: refined from the gradient norms G of a pilot run, smoothed by a running median.
    Equal norms give the straight line 1 - x. The warm-up comes out of the norms. norms: see `read_norms`; for adam the
    paper takes 1-norms. optimizer: adam or sgd. smooth: width of the median, a share of the run, 0 to 1.
    """
    no_warmup(at, "refined")
    wanted_level("smooth", smooth)
    levels = _refine(tuple(norms), 1.0 if optimizer == "adam" else 2.0, smooth)
    return interpolate(at.x, [i / (len(levels) - 1) for i in range(len(levels))], levels)


@register_schedule("chain", cyclic=True, ends="level")
def chain(at: Progress, *, pieces: Pieces) -> FloatArray:
    """Shapes in a row, each laid between its `start` (where the one before ended; 1 at first) and its `end` (0).

    pieces: mappings with name, length, start, end and the parameters of the shape; a percentage is of the whole
    horizon; levels are of g, so the floor still lifts them. The update at which a piece ends has that piece's end.
    """
    edges = np.cumsum([0] + [piece["length"] for piece in pieces])
    which = np.clip(np.searchsorted(edges, at.t, side="left") - 1, 0, len(pieces) - 1)
    value = np.empty_like(at.t)
    for i, piece in enumerate(pieces):
        here = which == i
        value[here] = _piece(piece, at.t[here] - edges[i])
    return value


def _piece(piece: dict[str, Any], t: FloatArray) -> FloatArray:
    shape, start, end = shape_named(piece["name"]), piece["start"], piece["end"]
    if piece["version"] != shape.version:
        raise ScheduleError(f"schedule spec: {shape.name} version {piece['version']!r} is not known here")
    if not shape.absolute:
        at = Progress(t, piece["length"], 0, 0.0)
        fall: FloatArray = shape.function(at, **piece["shape"])
        value: FloatArray = end + (start - end) * fall
        return value
    inside: FloatArray = shape.function(Progress(t, piece["length"], 0, end / start), **piece["shape"])
    scaled: FloatArray = np.where(inside == end / start, end, start * inside)
    return scaled


@lru_cache(maxsize=8)
def _refine(norms: tuple[float, ...], exponent: float, smooth: float) -> list[float]:
    """Levels at equal distances from x = 0 to 1."""
    half = int(len(norms) * smooth / 2)
    padded = np.pad(np.asarray(norms), half, mode="reflect" if half < len(norms) else "edge")
    weight = 1.0 / np.median(sliding_window_view(padded, 2 * half + 1), axis=1) ** exponent
    still_to_come = np.cumsum(weight[::-1])[::-1]
    level = np.append(weight * still_to_come, 0.0)
    return (level / level.max()).tolist()  # type: ignore[no-any-return]


def _is_pair(knot: object) -> bool:
    return isinstance(knot, list | tuple) and len(knot) == 2


def _knots_of_file(where: str, path: Path) -> list[tuple[str, float]]:
    rows = _rows(where, path)
    column = next((name for name in ("update", "tokens", "percent") if name in rows[0]), None)
    if column is None or "multiplier" not in rows[0]:
        raise ScheduleError(f"{where}: {path} needs the columns update, tokens or percent, and multiplier")
    unit = {"update": " steps", "tokens": " tokens", "percent": "%"}[column]
    try:
        return [(str(row[column]).strip() + unit, float(row["multiplier"])) for row in rows]
    except ValueError as error:
        raise ScheduleError(f"{where}: {path}: {error}") from None


def _norms_of_file(where: str, path: Path) -> list[float]:
    rows = [row for row in _rows(where, path) if row.get("grad_norm") is not None]
    if not rows:
        raise ScheduleError(f"{where}: {path} has no grad_norm column")
    try:
        return [float(row["grad_norm"]) for row in rows]
    except ValueError as error:
        raise ScheduleError(f"{where}: {path}: {error}") from None


def _rows(where: str, path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file with a header, or of a .jsonl file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    except OSError as error:
        beside = (p.name for p in path.parent.glob("*")) if path.parent.is_dir() else ()
        raise ScheduleError(f"{where}: cannot read {path}: {error.strerror}{did_you_mean(path.name, beside)}") from None
    except ValueError as error:
        raise ScheduleError(f"{where}: {path}: {error}") from None
    if not rows:
        raise ScheduleError(f"{where}: {path} holds no rows under its header")
    return rows
