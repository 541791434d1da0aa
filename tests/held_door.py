"""The door `python -m llmtrain`, but a job's first start waits after update HELD_AFTER until it is told to stop.

Tests that end a job in the middle run it, so that the middle comes when the test is ready. Later starts do not wait.
"""

import os
import sys
import time

from llmtrain.cli import main
from llmtrain.distributed import World
from llmtrain.train import stop
from llmtrain.train.stop import StopRequest

PATIENCE_S = 600


def hold(update: int) -> None:
    """Make this process wait when it has made so many updates."""
    stop.POLL_S = 0.0  # the ranks agree after every update
    agreed, made = StopRequest.agreed, 0

    def held(self: StopRequest, world: World, due: bool = False) -> str:
        nonlocal made
        made += 1
        deadline = time.monotonic() + PATIENCE_S
        while made == update and not self.reason:
            if time.monotonic() > deadline:
                sys.exit("nobody told this job to stop")
            time.sleep(0.02)
        return agreed(self, world, due)

    StopRequest.agreed = held  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and "HELD_AFTER" in os.environ:
        hold(int(os.environ["HELD_AFTER"]))
    main(sys.argv[1:])
