"""How long is "2000 steps", "8B tokens", "1%" or "auto"?

A length in a config always carries its unit, because a bare `1` could be one step or the whole run. Counts take
the decimal suffixes K, M, B and T. `Length` keeps what was written; `llmtrain.schedules` turns it into positions
on a curve, once the tokens per update are known.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

Unit = Literal["steps", "tokens", "percent", "auto"]

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_COUNT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([KMBTG]?)\s*")
_LENGTH = re.compile(r"\s*(?P<number>.*?)\s*(?P<unit>steps?|tokens?|%)\s*")


def _count(text: str, suffixes: dict[str, int]) -> int | None:
    """The exact integer that `text` writes, or None where it writes none."""
    match = _COUNT.fullmatch(text)
    if match is None or match[2] not in suffixes:
        return None
    value = Fraction(match[1].replace("_", "")) * suffixes[match[2]]
    return int(value) if value.denominator == 1 else None


def parse_batch_tokens(value: int | str) -> int:
    """Tokens in a global batch. K and M are powers of two here, as batches are named: `4M` is 4,194,304."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a number of tokens: write 524288, 512K or 4M")
    found = value if isinstance(value, int) else _count(value, _BINARY)
    if found is None or found < 1:
        raise ValueError(f"{value!r} is not a number of tokens: write 524288, 512K or 4M (K = 1024, M = 1048576)")
    return found


def show_bytes(count: int) -> str:
    """`1.50 GiB`, or in the smaller unit that leaves something before the point."""
    power = min(3, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.{2 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


@dataclass(frozen=True)
class Length:
    """A length of training as the user wrote it. `value` counts steps or tokens, or is a percentage of the horizon."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: object) -> "Length":
        """Read `2000 steps`, `8B tokens`, `1%`, `auto` or `0`. Raises ValueError saying what to write instead."""
        if isinstance(text, Length):
            return text
        if text == 0 and not isinstance(text, bool):
            return cls(0, "steps")
        if isinstance(text, int | float) and not isinstance(text, bool):
            raise ValueError(f'{text} has no unit: write "{text} steps", "{text} tokens" or "{text}%"')
        if not isinstance(text, str):
            raise ValueError(f'{text!r} is not a length: write "2000 steps", "8B tokens", "1%" or "auto"')
        if text.strip() == "auto":
            return cls(0, "auto")
        match = _LENGTH.fullmatch(text)
        if match is None:
            hint = f'write "{text.strip()} steps"' if _count(text, _DECIMAL) is not None else 'write "2000 steps"'
            raise ValueError(f'{text!r} has no unit: {hint}, or a length in tokens ("8B tokens"), or percent ("1%")')
        if match["unit"] == "%":
            return cls._percent(text, match["number"])
        count = _count(match["number"], _DECIMAL)
        if count is None:
            raise ValueError(f"{text!r}: {match['number']!r} is not a whole number (suffixes K, M, B, T are decimal)")
        return cls(count, "steps" if match["unit"].startswith("step") else "tokens")

    @classmethod
    def _percent(cls, text: str, number: str) -> "Length":
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"{text!r}: {number!r} is not a number") from None
        if not 0 <= value <= 100:
            raise ValueError(f"{text!r} is outside 0% to 100%")
        return cls(value, "percent")

    def updates(self, tokens_per_update: int, horizon_updates: int = 0) -> int:
        """Whole optimizer updates that cover this length. Percent is of `horizon_updates`; `auto` is none."""
        assert self.unit != "auto", "auto is resolved by the field that allows it"
        if self.unit == "steps":
            return int(self.value)
        if self.unit == "tokens":
            return -(-int(self.value) // tokens_per_update)
        return math.ceil(Fraction(str(self.value)) * horizon_updates / 100)

    def __str__(self) -> str:
        if self.unit == "auto":
            return "auto"
        if self.unit == "percent":
            return f"{self.value:g}%"
        return f"{int(self.value)} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )
