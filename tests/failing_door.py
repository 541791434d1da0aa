"""The door `python -m llmtrain`, but one node is not like the others, or a job's first start hangs on it.

BAD_NODE names the node. HANGS_AFTER: it hangs after so many updates. OTHER_CODE: a folder it takes llmtrain from; then
it also has another schedule.
"""

import os
import sys
import time
from typing import Any


def hang(update: int) -> None:
    """Make this process hang when it has made so many updates."""
    from llmtrain.train.stop import StopRequest

    agreed, made = StopRequest.agreed, 0

    def heard(self: StopRequest, world: Any, due: bool = False) -> str:
        nonlocal made
        made += 1
        if made == update:
            time.sleep(3600)
        return agreed(self, world, due)

    StopRequest.agreed = heard  # type: ignore[method-assign]


def main() -> None:
    if "train" in sys.argv and os.environ["BAD_NODE"] == os.environ.get("SLURMD_NODENAME"):
        if "OTHER_CODE" in os.environ:
            sys.path.insert(0, os.environ["OTHER_CODE"])
            sys.argv += ["--set", "schedule.peak=0.02"]
        elif os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            hang(int(os.environ["HANGS_AFTER"]))
    from llmtrain.cli import main as door

    door(sys.argv[1:])


if __name__ == "__main__":
    main()
