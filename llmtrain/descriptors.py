"""How many files and connections may this process have open?

A system starts processes with a low limit, often 1,024, and lets them raise it themselves up to a second one. A rank
has a connection to every other rank in each group, the first rank one more to each, and token files stay mapped.
"""

import contextlib
import sys

if sys.platform != "win32":
    import resource


def raise_limit() -> None:
    """From here on this process, and those it starts, may open as many as the system lets it."""
    if sys.platform == "win32":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # no limit at all is more than some systems take
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int:
    """How many this process may have open now."""
    if sys.platform == "win32":
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft
