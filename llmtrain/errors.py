"""What went wrong, for the person who can mend it.

Every mistake a user can make ends in one of these. The message names the field or file, the value
found, what was wanted, and the command that helps. `assert` is for our own mistakes.
"""

import difflib
from collections.abc import Iterable


class LlmtrainError(Exception):
    """Base of everything a user can cause. The doors print it without a traceback and exit with `exit_code`."""

    exit_code = 2


class ConfigError(LlmtrainError):
    """A configuration that cannot be run as written."""


class ScheduleError(LlmtrainError):
    """A learning-rate schedule that is unknown, impossible, or not the one the run was started with."""


class DataError(LlmtrainError):
    """Token files, tokenizers or text sources that are missing, damaged, or do not belong together."""


class CheckpointError(LlmtrainError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class EnvironmentError(LlmtrainError):
    """A machine, launcher or package that cannot do what was asked of it."""


class DivergenceError(LlmtrainError):
    """Training produced a number that is not finite. Nothing was saved from it."""

    exit_code = 3


class RankError(LlmtrainError):
    """A rank died or made no progress, so the job was ended. The last checkpoint is good: the same command goes on."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`'; did you mean "warmup"?'` where a known word is close, else the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(known)}" if known else ""
