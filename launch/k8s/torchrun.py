"""torchrun, ending with the exit code of the rank that failed first, which tells Kubernetes whether to start again.

torchrun itself ends with 1 whatever happened. Here 2 (a mistake of the user) and 3 (a loss that is not finite) are
handed on: another start makes them again. Everything else is 128 or more, as an exit code for which a pod is started
again: 128 plus the number of a signal, or plus the rank's own code. Takes torchrun's arguments.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

MISTAKES = (2, 3)


def exit_code(error: ChildFailedError) -> int:
    """What the pod ends with."""
    _, failure = error.get_first_failure()
    code = int(failure.exitcode)
    return code if code in MISTAKES else 128 + abs(code)


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error))
