"""What does a probe find, and how does it ask another program?"""

import subprocess
from typing import Literal, NamedTuple

WITHIN_S = 2.0


class Finding(NamedTuple):
    """What one probe found."""

    probe: str
    level: Literal["fine", "note", "wrong"]
    found: str
    remedy: str = ""


def command(*words: str) -> str | None:
    """What a command printed; None where it is not there, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
