"""The learning rate of update k, as a pure function: `plan(config.schedule, config.batch.tokens)` gives a `Schedule`.

Nothing here is stepped or stored, and nothing here imports torch.
"""

from llmtrain.schedules import decays, given, phases  # noqa: F401  # each registers its shapes
from llmtrain.schedules.registry import Progress, Units, UnitsList, catalog, register_schedule
from llmtrain.schedules.resume import Change, both_sides, continues, diff, extend, latest, refusal, replace
from llmtrain.schedules.schedule import Schedule, plan

__all__ = [
    "Change",
    "Progress",
    "Schedule",
    "Units",
    "UnitsList",
    "both_sides",
    "catalog",
    "continues",
    "diff",
    "extend",
    "latest",
    "plan",
    "refusal",
    "register_schedule",
    "replace",
]
