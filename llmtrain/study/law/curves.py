"""Which loss did a run reach under which learning rates? Read from a run folder, or from a CSV file `step,lr,loss`.

A row says: after update `step`, which used `lr`, the loss was `loss`. Where a file has no row for every update, the
rate between two rows lies on the straight line between them; a change between two level stretches is a jump at the
later row. Before the first row it rises from 0 to the first row's rate over the warm-up, and holds. Losses up to the
end of the warm-up are left out. Of a run folder that branched off, the trunk's rows come first.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.errors import DataError, did_you_mean
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.study.law.laws import SEGMENTS, Track, first_peak, track
from llmtrain.train.metrics import read_metrics

LossKind = Literal["validation", "train"]

MOST_POINTS = 600  # of one curve; of a longer one, equal blocks are averaged
_TRAIN_POINTS = 200  # blocks into which the losses of single batches are averaged
_COLUMNS = ("step", "lr", "loss")
_COMPARED = {"model_hash": "model", "data_hash": "data", "set_hash": "validation set"}


@dataclass(frozen=True)
class LossCurve:
    """One run: T updates, n losses after the warm-up."""

    name: str
    lrs: FloatArray  # (T,) of update 1 to the last row
    warmup: int  # update at which it ends
    steps: IntArray  # (n,)
    losses: FloatArray  # (n,) nats per token
    setting: dict[str, Any]  # what else shapes the loss, as far as it is known

    @property
    def peak(self) -> float:
        return float(self.lrs.max())

    def track(self, peak: float, segments: int = SEGMENTS) -> Track:
        """This curve as the laws see it, in multiples of `peak`."""
        return track(self.lrs / peak, self.warmup, self.steps, segments)


def read_curve(path: Path, warmup: int | None = None, burn_in: int = 0, kind: LossKind = "validation") -> LossCurve:
    """Read a run folder or a CSV file. `warmup` in updates; None: where the highest rate is first reached.

    Losses of `burn_in` updates after the warm-up are left out too. `kind`: which loss of a run folder; training losses
    are averaged over blocks.

    Raises DataError naming the file, the place in it, and what was wanted.
    """
    if path.is_dir():
        return _from_run(path, warmup, burn_in, kind)
    return _from_csv(path, warmup, burn_in)


def setting_of(config: Config) -> dict[str, Any]:
    """What of a config shapes the loss besides the schedule."""
    return {
        "tokens per update": config.batch.tokens,
        "optimizer": config.optim.name,
        "weight decay": config.optim.weight_decay,
        "betas": list(config.optim.betas),
    }


def _from_csv(path: Path, warmup: int | None, burn_in: int) -> LossCurve:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        beside = (p.name for p in path.parent.glob("*.csv")) if path.parent.is_dir() else ()
        raise DataError(
            f"cannot read {path}: {error.strerror}{did_you_mean(path.name, beside)}; wanted a run folder or a CSV file "
            "with the columns step, lr, loss"
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not text: wanted a run folder or a CSV file with the columns step, lr, loss"
        ) from None
    reader = csv.DictReader(lines, skipinitialspace=True)
    header = reader.fieldnames or []
    for column in _COLUMNS:
        if column not in header:
            raise DataError(
                f"{path} has no column {column}: its first line is {','.join(header)!r}, wanted step,lr,loss"
            )
    rows = [[_number(path, reader.line_num, column, row[column]) for column in _COLUMNS] for row in reader]
    table = np.array(rows, np.float64).reshape(-1, 3)
    _check_rows(str(path), table[:, 0], table[:, 1])
    steps = table[:, 0].astype(np.int64)
    every, end = _rates(steps, table[:, 1], warmup)
    points, losses = _kept(steps, table[:, 2], end + burn_in, MOST_POINTS)
    return LossCurve(path.stem, every, end, points, losses, {})


def _from_run(folder: Path, warmup: int | None, burn_in: int, kind: LossKind) -> LossCurve:
    rows = _rows(folder)
    updates = [row for row in rows if row["kind"] == "step"]
    measured = [row for row in rows if row["kind"] == "validation" and row["set"] == "validation"]
    setting = {what: measured[-1][key] for key, what in _COMPARED.items() if measured and key in measured[-1]}
    if (folder / "config.yaml").is_file():
        setting |= setting_of(load_config(folder / "config.yaml"))
    if kind == "train":
        setting.pop("validation set", None)
        measured = updates
    steps = np.array([row["step"] for row in updates], np.int64)
    lrs = np.array([row["lr"] for row in updates], np.float64)
    _check_rows(f"{folder}/metrics.jsonl", steps, lrs)
    at = np.array([row["step"] for row in measured], np.int64)
    losses = np.array([row["loss"] for row in measured], np.float64)
    if not np.all(np.isfinite(losses)):
        raise DataError(f"{folder}/metrics.jsonl has a loss that is not finite; leave this run out")
    every, end = _rates(steps, lrs, warmup)
    points, losses = _kept(at, losses, end + burn_in, _TRAIN_POINTS if kind == "train" else MOST_POINTS)
    return LossCurve(folder.name, every, end, points, losses, setting)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """All rows from update 1 on, those of the trunk before those of a branch."""
    rows = read_metrics(folder)
    first = min((row["step"] for row in rows if row["kind"] == "step"), default=1)
    if first == 1:
        return rows
    parent = load_config(folder / "config.yaml").run.parent
    if parent is None:
        raise DataError(f"{folder}/metrics.jsonl starts at update {first}: wanted the learning rates from update 1 on")
    trunk, update = Path(parent[0]), parent[1]
    return [row for row in _rows(trunk) if row["step"] <= update] + [row for row in rows if row["step"] > update]


def _rates(steps: IntArray, lrs: FloatArray, warmup: int | None) -> tuple[FloatArray, int]:
    """The rate of every update, and the update at which the warm-up ends."""
    rise = int(steps[0]) if warmup is None else min(warmup, int(steps[0]))
    every = rates_between(steps, lrs, rise)
    return every, first_peak(every) if warmup is None else max(warmup, 1)


def rates_between(steps: IntArray, lrs: FloatArray, rise: int) -> FloatArray:
    """The rate of every update from 1 to the last of `steps`; before the first it rises over `rise` updates."""
    level = np.isclose(np.diff(lrs), 0.0, rtol=0, atol=1e-6 * lrs.max())
    jump = np.zeros(len(level), bool)
    jump[1:-1] = ~level[1:-1] & level[:-2] & level[2:]
    places, values = list(steps.astype(np.float64)), list(lrs)
    for i in reversed(np.flatnonzero(jump & (np.diff(steps) > 1))):
        places.insert(i + 1, float(steps[i + 1] - 1))
        values.insert(i + 1, float(lrs[i]))
    if steps[0] > 1:
        places, values = [0.0, float(rise), *places], [0.0, float(lrs[0]), *values]
        if rise == steps[0]:
            del places[1], values[1]
        elif rise == 0:
            del places[0], values[0]
    between: FloatArray = np.interp(np.arange(1, int(steps[-1]) + 1), places, values)
    return between


def _kept(steps: IntArray, losses: FloatArray, after: int, most: int) -> tuple[IntArray, FloatArray]:
    """The losses after update `after`; where they are more than `most`, means over as many equal blocks."""
    steps, losses = steps[steps > after], losses[steps > after]
    if len(steps) <= most:
        return steps, losses
    middles = [round(float(block.mean())) for block in np.array_split(steps, most)]
    return np.array(middles, np.int64), np.array([float(block.mean()) for block in np.array_split(losses, most)])


def _number(path: Path, line: int, column: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}, line {line}: {column} is {text!r}, wanted a finite number; leave such rows out")
    return value


def _check_rows(where: str, steps: FloatArray | IntArray, lrs: FloatArray) -> None:
    if len(steps) < 2:
        raise DataError(f"{where} holds {len(steps)} rows, wanted at least 2")
    if steps[0] < 1 or np.any(np.diff(steps) <= 0) or np.any(steps != np.round(steps)):
        wrong = int(np.argmax(np.concatenate([[steps[0] < 1], np.diff(steps) <= 0]) | (steps != np.round(steps))))
        raise DataError(f"{where}: step {steps[wrong]:g} in row {wrong + 1}, wanted whole numbers from 1 on that rise")
    if lrs.min() < 0 or lrs.max() <= 0 or not np.all(np.isfinite(lrs)):
        raise DataError(
            f"{where}: learning rates from {lrs.min():g} to {lrs.max():g}, wanted 0 or more, and a peak above 0"
        )
