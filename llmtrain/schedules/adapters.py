"""How does a training loop of one's own use a schedule?

Each adapter counts from 0, as its framework does: its count n is update k = n + 1. Its state is the counter and the
spec, never a learning rate, so a restored one cannot carry an old peak along. torch is imported by the function that
needs it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmtrain.errors import ScheduleError
from llmtrain.schedules.schedule import Schedule

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def lambda_lr(schedule: Schedule) -> Callable[[int], float]:
    """For `torch.optim.lr_scheduler.LambdaLR(optimizer, lambda_lr(schedule))`: multiplies each group's own `lr`."""
    return lambda count: schedule(count + 1)


def optax_schedule(schedule: Schedule) -> Callable[[int], float]:
    """The learning rate by optax's count of updates done; for use outside of jit (`optax.inject_hyperparams`)."""
    return lambda count: schedule.lr(int(count) + 1)


def lr_scheduler(optimizer: "Optimizer", schedule: Schedule, last_epoch: int = -1) -> "LRScheduler":
    """A torch LRScheduler whose learning rates are each group's `lr` at its making (`initial_lr`) times the multiplier.

    `state_dict` is {"last_epoch", "spec"}; loading one of another schedule raises ScheduleError.
    """
    from torch.optim.lr_scheduler import LRScheduler

    class PlannedLR(LRScheduler):
        def get_lr(self) -> list[Any]:
            return [base * schedule(self.last_epoch + 1) for base in self.base_lrs]

        def state_dict(self) -> dict[str, Any]:
            return {"last_epoch": self.last_epoch, "spec": schedule.spec}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if state_dict["spec"] != schedule.spec:
                raise ScheduleError("this state belongs to another schedule; join the two with replace or extend")
            self.last_epoch = state_dict["last_epoch"]
            self._last_lr = self.get_lr()
            for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
                group["lr"] = lr

    return PlannedLR(optimizer, last_epoch)
