"""Which learning rate do other frameworks use at update k for the same words?

They disagree about the index: whether update 1 gets 0 or peak/W, whether the last one gets the floor, whether the peak
comes once. A convention here is where each phase reads its position, as a lag behind k. It holds for updates 1 to T;
past T the curve stays at its end, also where the framework's own would rise again. For people who migrate a run; the
convention of llmtrain itself has no lags.
"""

from dataclasses import dataclass, replace
from typing import Any

from llmtrain.errors import ScheduleError, did_you_mean


@dataclass(frozen=True)
class Convention:
    """Lags in updates. A phase sees position k - lag; the warm-up lasts while k - switch_lag < W."""

    shapes: frozenset[str] | None = None  # the shapes that framework has; None: all of llmtrain's
    warmup_lag: float = 0
    switch_lag: float = 0
    decay_lag: float = 0
    warmup_extra: int = 0  # added to W in the warm-up's slope
    clips: bool = False  # the floor cuts the curve instead of lifting it
    warmup_from_floor: bool = False
    has_start: bool = False  # its warm-up may begin above 0


def _lagging(lag: float, *shapes: str, has_start: bool = False) -> Convention:
    return Convention(frozenset(shapes), lag, lag, lag, has_start=has_start)


CONVENTIONS: dict[str, Convention] = {
    "llmtrain": Convention(),
    # transformers.optimization; also what optax and lingua do
    "hf": _lagging(1, "constant", "linear", "cosine", "polynomial", "inverse_sqrt", "sgdr", "wsd"),
    # megatron/core/optimizer_param_scheduler.py
    "megatron": _lagging(1, "constant", "linear", "cosine", "inverse_sqrt", "wsd", has_start=True),
    # OLMo-core optim/scheduler.py: the same as llmtrain's
    "olmo": _lagging(0, "constant", "linear", "cosine", "cosine_linear", "inverse_sqrt", "wsd", has_start=True),
    # components/optimizer/lr_scheduler.py: the peak twice, never quite the floor
    "torchtitan": Convention(frozenset({"linear", "cosine", "wsd"}), warmup_lag=0, switch_lag=1, decay_lag=1),
    # runtime/lr_schedules.py: WarmupLR, WarmupDecayLR, WarmupCosineLR; two updates at 0
    "deepspeed": _lagging(2, "constant", "linear", "cosine"),
    # litgpt/pretrain.py counts micro-batches: see _litgpt
    "litgpt": _lagging(1, "cosine"),
    # train.py: (i + 1) / (W + 1)
    "nanogpt": Convention(frozenset({"cosine"}), warmup_lag=0, switch_lag=1, decay_lag=1, warmup_extra=1),
}


def convention_for(shape: str, params: dict[str, Any]) -> Convention:
    """The convention that a spec names for `shape`. Raises ScheduleError where that framework has no such schedule."""
    name = params["convention"]
    if not isinstance(name, str) or name not in CONVENTIONS:
        raise ScheduleError(f"unknown schedule.convention {name!r}{did_you_mean(str(name), CONVENTIONS)}")
    convention = CONVENTIONS[name]
    if convention.shapes is None:
        return convention
    if shape not in convention.shapes:
        raise ScheduleError(f"convention {name} has no schedule {shape}, it has {', '.join(sorted(convention.shapes))}")
    if params["unit"] == "tokens" and convention.switch_lag:
        raise ScheduleError(f"convention {name} counts updates: write schedule.horizon in steps")
    if params["warmup_start"] and not convention.has_start:
        raise ScheduleError(f"convention {name} has no schedule.warmup_start: leave it out")
    if name == "litgpt":
        return _litgpt(params["accumulation"])
    if name == "deepspeed":
        return _deepspeed(convention, shape, params["warmup"], params["warmup_shape"])
    if name == "megatron":
        return replace(convention, clips=shape == "inverse_sqrt")
    return replace(convention, warmup_from_floor=name == "hf" and shape == "wsd")


def _litgpt(accumulation: object) -> Convention:
    """Its counter is of micro-batches, so the lag is one of them."""
    if type(accumulation) is not int or accumulation < 1:
        raise ScheduleError(f"schedule.accumulation is {accumulation!r}, wanted micro-batches of an update, from 1 on")
    return _lagging(1 / accumulation, "cosine")


def _deepspeed(convention: Convention, shape: str, warmup: int, warmup_shape: str) -> Convention:
    """WarmupCosineLR counts one further in its decay than in its warm-up, and `log` takes the count plus one."""
    if warmup < 2:
        raise ScheduleError("convention deepspeed warms up over at least 2 updates")
    return replace(convention, decay_lag=1 if shape == "cosine" else 2, warmup_lag=1 if warmup_shape == "log" else 2)
