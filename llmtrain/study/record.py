"""What happened in a run: which schedule did it follow, at which rates, to which losses, and did it reach its end?

Read from the run folder alone. `key` says what makes two runs replicates: the schedule without its peak and everything
else that shapes the loss but the seed. The area is the sum of the learning rates used, those of a trunk included.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config import Config, content_hash
from llmtrain.config_file import load_config
from llmtrain.errors import ConfigError, DataError, ScheduleError
from llmtrain.schedules import Schedule, plan
from llmtrain.schedules.exact import FloatArray, IntArray
from llmtrain.study.statistics import spikes
from llmtrain.train.metrics import DOCUMENTS_FILE, METRICS_FILE, read_metrics

STUDY_FILE = "study.json"  # in the folder of a study, written by `llmtrain sweep`

_SETTING = ("optim", "batch", "seq_len", "precision", "document_mask")


@dataclass(frozen=True)
class StudyRuns:
    """The runs of a study, by the names of their folders."""

    name: str
    baseline: list[str]  # those that the others are compared with
    runs: list[str]


@dataclass(frozen=True)
class RunRecord:
    """One run. The arrays have one element for each of its n updates."""

    folder: Path
    name: str
    config: Config
    key: str
    traits: dict[str, str]  # the same in words, to tell schedules apart
    steps: IntArray  # (n,)
    tokens: IntArray  # (n,)
    losses: FloatArray  # (n,) nats per token of the batch
    lrs: FloatArray  # (n,)
    areas: FloatArray  # (n,) of all updates so far; nan where a trunk's rates are not known
    speeds: FloatArray  # (n,) tokens/s
    validations: list[dict[str, Any]]  # of the set `validation`, in order
    unfinished: str  # why its last loss is not its end: '' where it is
    rate_error: float | None  # largest |used - planned| / peak; None where the plan is not the run's whole schedule
    documents: FloatArray | None  # (D, 2) summed nats, tokens

    @property
    def final(self) -> dict[str, Any]:
        """The last validation."""
        return self.validations[-1]

    @property
    def loss(self) -> float:
        """Of the last validation, in nats per token."""
        return float(self.final["loss"])

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        return str(self.final["schedule"])

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def peak(self) -> float:
        return self.config.schedule.peak

    @property
    def area(self) -> float:
        """Of the whole run; nan where it is not known."""
        return float(self.areas[-1]) if len(self.areas) else math.nan

    @property
    def spikes(self) -> int:
        """See `llmtrain.study.statistics.spikes`."""
        return spikes(self.losses)

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the updates, the first left out."""
        return float(np.median(self.speeds[1:])) if len(self.speeds) > 1 else None

    def area_at(self, step: int) -> float:
        """The area through update `step`."""
        if not len(self.steps):
            return math.nan
        at = int(np.searchsorted(self.steps, step, side="right"))
        return float(self.areas[at - 1]) if at else float(self.areas[0] - self.lrs[0])

    def reached(self, target: float) -> dict[str, Any] | None:
        """The first validation with at most this loss."""
        return next((row for row in self.validations if row["loss"] <= target), None)


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders named, and those in the folders named: of a study its own, in its order.

    Raises DataError where there is none in one.
    """
    found: list[Path] = []
    for path in paths:
        if (path / METRICS_FILE).is_file():
            found.append(path)
            continue
        study = read_study_file(path)
        names = sorted(file.parent.name for file in path.glob(f"*/{METRICS_FILE}")) if study is None else study.runs
        inside = [path / name for name in names if (path / name / METRICS_FILE).is_file()]
        if not inside:
            raise DataError(
                f"{path} is not a run folder, it has no {METRICS_FILE}, and holds none: name run folders, or a folder "
                "of run folders"
            )
        found += inside
    return list(dict.fromkeys(found))


def read_study_file(folder: Path) -> StudyRuns | None:
    """The runs of the study that a folder holds; None where it holds none. Raises DataError where that is damaged."""
    path = folder / STUDY_FILE
    try:
        values = json.loads(path.read_bytes())
        return StudyRuns(values["name"], list(values["baseline"]), list(values["runs"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}; `llmtrain sweep` writes it anew") from None


def read_record(folder: Path) -> RunRecord:
    """Everything a comparison needs of one run. Raises DataError where it was never validated."""
    rows = read_metrics(folder)
    validations = [row for row in rows if row["kind"] == "validation" and row["set"] == "validation"]
    if not validations:
        raise DataError(f"{folder} has no validation yet: let it train, or look at its log")
    config = load_config(folder / "config.yaml")
    updates = [row for row in rows if row["kind"] == "step"]
    steps, tokens = (np.array([row[key] for row in updates], np.int64) for key in ("step", "tokens"))
    losses, lrs = (np.array([row[key] for row in updates], np.float64) for key in ("loss", "lr"))
    planned = _planned(config)
    whole = planned is not None and planned.hash == validations[-1]["schedule_hash"]
    traits = _traits(config, validations[-1], joined=planned is not None and not whole)
    return RunRecord(
        folder=folder,
        name=folder.resolve().name if folder.name in ("", ".", "..") else folder.name,
        config=config,
        key=_key(traits, planned if whole else None, lrs, config.schedule.peak),
        traits=traits,
        steps=steps,
        tokens=tokens,
        losses=losses,
        lrs=lrs,
        areas=_area_before(folder, config, steps) + np.cumsum(lrs),
        speeds=np.array([row.get("tokens_per_s", math.nan) for row in updates], np.float64),
        validations=validations,
        unfinished=_unfinished(config, validations[-1], steps, losses),
        rate_error=_rate_error(planned, steps, lrs) if planned is not None and whole else None,
        documents=_documents(folder / DOCUMENTS_FILE, validations[-1]),
    )


def _planned(config: Config) -> Schedule | None:
    """The schedule of the config; None where it is in a file of the user's: a report runs no code of a run folder."""
    if "module" in config.schedule.shape:
        return None
    try:
        return plan(config.schedule, config.batch.tokens, config.optim.betas[1])
    except ScheduleError:
        return None


def _traits(config: Config, final: dict[str, Any], joined: bool) -> dict[str, str]:
    """What tells this run's schedule and setting from others, as it was written."""
    schedule = config.schedule.model_dump(mode="json", exclude={"peak", "name"})
    parent = config.run.parent
    traits = {
        "schedule": config.schedule.name,
        **schedule,
        **({"branch": f"@{parent[1]}"} if parent is not None else {}),
        **({"joined": str(final["schedule"])} if joined and parent is None else {}),
        **{f"optim.{key}": value for key, value in config.optim.model_dump(mode="json").items()},
        "batch": config.batch.sequences,
        "seq_len": config.batch.seq_len,
        "precision": config.engine.precision,
        "document_mask": config.data.document_mask,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in traits.items()}


def _key(traits: dict[str, str], whole: Schedule | None, lrs: FloatArray, peak: float) -> str:
    """One text for replicates. Where the plan is not the whole schedule, the rates used stand for it."""
    if whole is None:
        return content_hash([traits, [f"{multiplier:.6g}" for multiplier in (lrs / peak).tolist()]])
    spec = whole.spec
    del spec["params"]["peak"]
    setting = {key: value for key, value in traits.items() if differs_in_setting(key)}
    return content_hash([spec, setting])


def differs_in_setting(trait: str) -> bool:
    """Whether a trait belongs to the setting of a run rather than to its schedule."""
    return trait.partition(".")[0] in _SETTING


def _area_before(folder: Path, config: Config, steps: IntArray) -> float:
    """The area under the updates before the first that is logged here: those of the trunk of a branch."""
    if not len(steps) or steps[0] <= 1:
        return 0.0
    if config.run.parent is None:
        return math.nan
    named, update = Path(config.run.parent[0]), config.run.parent[1]
    for trunk in (named, folder.parent / named.name):
        try:
            rows = [row for row in read_metrics(trunk) if row["kind"] == "step" and row["step"] <= update]
            trunk_config = load_config(trunk / "config.yaml")
        except (DataError, ConfigError):
            continue
        own = np.array([row["step"] for row in rows], np.int64)
        if not len(own) or own[-1] != update:
            return math.nan
        return _area_before(trunk, trunk_config, own) + math.fsum(row["lr"] for row in rows)
    return math.nan


def _unfinished(config: Config, final: dict[str, Any], steps: IntArray, losses: FloatArray) -> str:
    if not math.isfinite(final["loss"]):
        return f"its loss was {final['loss']} after update {final['step']:,}"
    if len(losses) and not np.all(np.isfinite(losses)):
        return f"its loss was not finite at update {int(steps[~np.isfinite(losses)][0]):,}"
    last = config.last_update
    if final["step"] < last and final["tokens"] < last * config.batch.tokens:
        return f"it ended after update {final['step']:,} of {last:,}"
    return ""


def _rate_error(planned: Schedule, steps: IntArray, lrs: FloatArray) -> float:
    if not len(steps):
        return 0.0
    return float(np.abs(lrs - planned.peak * planned.multipliers(steps)).max() / planned.peak)


def _documents(path: Path, final: dict[str, Any]) -> FloatArray | None:
    """The nats of each validation document, where they are there and are those of the last validation."""
    if not path.is_file():
        return None
    try:
        found: FloatArray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete it, noise of the text is then not known") from None
    if found.ndim != 2 or found.shape[1] != 2 or found[:, 1].sum() != final["num_tokens"]:
        return None
    nats = float(found[:, 0].sum()) / float(found[:, 1].sum())
    return found if math.isclose(nats, final["loss"], rel_tol=1e-6) else None
