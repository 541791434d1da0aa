"""Which of these schedules would end lowest, and which of them can be told apart?"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config_file import load_config
from llmtrain.errors import EnvironmentError, ScheduleError
from llmtrain.schedules.exact import FloatArray
from llmtrain.study.law.curves import setting_of
from llmtrain.study.law.fitted import FittedLaw, Predicted, predict
from llmtrain.study.law.laws import first_peak
from llmtrain.study.law.trust import Doubt, doubts_of_schedule
from llmtrain.study.schedule_shown import Shown, look_at

COMMON = (
    "constant",
    "cosine",
    "linear",
    "polynomial:power=2",
    "wsd",
    "wsd:cooldown=1-sqrt",
    "wsd:cooldown=cosine",
    "wsd:decay=10%",
    "wsd:decay=40%",
)
_DRAWN = 200  # places of a curve that is written


@dataclass(frozen=True)
class Asked:
    """A schedule that a prediction is wanted for."""

    label: str
    lrs: FloatArray  # (T,) of update 1 to the end of the run
    setting: dict[str, Any]  # what of the run besides the schedule is known


@dataclass(frozen=True)
class Ranked:
    """One schedule among others."""

    asked: Asked
    doubts: tuple[Doubt, ...]
    predicted: Predicted | None  # after its last update; None where refused

    @property
    def label(self) -> str:
        return self.asked.label

    @property
    def loss(self) -> float:
        return np.inf if self.predicted is None else float(self.predicted.losses[-1])


def asked(
    law: FittedLaw, items: Sequence[str], overrides: Sequence[str] = (), tokens_per_update: str | None = None
) -> list[Asked]:
    """Plan schedules by name (`wsd:decay=10%`) or of config files (`run.yaml`), as `llmtrain schedule show` does.

    Without a config file, what `overrides` (KEY=VALUE) leave open is as in the fitted runs: peak, warm-up, horizon, and
    the lowest multiplier as floor.
    """
    configs = [Path(item) for item in items if item.endswith((".yaml", ".yml"))]
    names = [item for item in items if not item.endswith((".yaml", ".yml"))]
    if configs:
        shown = look_at(names, configs, overrides, tokens_per_update)
    else:
        batch = law.range.setting.get("tokens per update")
        tokens_per_update = tokens_per_update or (None if batch is None else str(batch))
        shown = [_as_fitted(law, name, overrides, tokens_per_update) for name in names]
    of_run = [text for text in overrides if "." in text.partition("=")[0] and not text.startswith("schedule.")]
    settings = [setting_of(load_config(path, of_run)) for path in configs] + [{}] * len(names)
    return [
        Asked(one.label, one.lrs()[: one.summary.updates], setting)
        for one, setting in zip(shown, settings, strict=True)
    ]


def rank(law: FittedLaw, schedules: Sequence[Asked]) -> list[Ranked]:
    """Schedules by predicted final loss, the best first and the refused last."""
    found = []
    for one in schedules:
        warmup = first_peak(one.lrs)
        doubts = tuple(doubts_of_schedule(law.range, one.lrs, warmup, one.setting))
        refused = any(doubt.refuses for doubt in doubts)
        predicted = None if refused else predict(law, one.lrs, warmup, np.array([len(one.lrs)]))
        found.append(Ranked(one, doubts, predicted))
    return sorted(found, key=lambda one: one.loss)


def ranking_json(law: FittedLaw, ranked: Sequence[Ranked]) -> dict[str, Any]:
    """What `--json` prints of a ranking. Losses in nats per token, intervals of 95 %."""
    best = ranked[0].loss
    return {"resolvable": law.resolvable, "schedules": [_entry(one, best, law.resolvable) for one in ranked]}


def write_curves(law: FittedLaw, ranked: Sequence[Ranked], path: Path) -> None:
    """The predicted curves of all that are not refused: schedule, update, lr, loss and its interval."""
    rows: list[list[object]] = []
    for one in ranked:
        if one.predicted is None:
            continue
        lrs = one.asked.lrs
        warmup = first_peak(lrs)
        updates = np.unique(np.linspace(warmup + 1, len(lrs), _DRAWN).round().astype(np.int64))
        found = predict(law, lrs, warmup, updates)
        for k, loss, half in zip(updates.tolist(), found.losses.tolist(), found.half_widths.tolist(), strict=True):
            rows.append([one.label, k, float(lrs[k - 1]), loss, loss - half, loss + half])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["schedule", "step", "lr", "loss", "low", "high"])
            writer.writerows(rows)
    except OSError as error:
        raise EnvironmentError(f"cannot write {path}: {error.strerror}") from None


def _as_fitted(law: FittedLaw, name: str, overrides: Sequence[str], tokens_per_update: str | None) -> Shown:
    """A schedule with the numbers of the fitted runs; without their warm-up where its shape draws its own."""
    span = law.range
    words = [f"peak={span.peak!r}", f"horizon={span.updates} steps", f"floor={round(span.lowest, 6)}"]
    try:
        return look_at([name], (), [*words, f"warmup={span.warmup} steps", *overrides], tokens_per_update)[0]
    except ScheduleError:
        return look_at([name], (), [*words, "warmup=0", *overrides], tokens_per_update)[0]


def _entry(one: Ranked, best: float, resolvable: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "schedule": one.label,
        "updates": len(one.asked.lrs),
        "doubts": [doubt._asdict() for doubt in one.doubts],
    }
    if one.predicted is None:
        return {**found, "loss": None, "interval": None, "momentum_loss": None, "above_best": None, "told_apart": None}
    half = float(one.predicted.half_widths[-1])
    momentum = None if one.predicted.momentum is None else float(one.predicted.momentum[-1])
    return {
        **found,
        "loss": one.loss,
        "interval": [one.loss - half, one.loss + half],
        "momentum_loss": momentum,
        "above_best": one.loss - best,
        "told_apart": one.loss - best > resolvable,
    }
