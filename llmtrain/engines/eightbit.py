"""How is a moment kept in 8 bits, and what comes back?

Each block of 256 elements keeps its largest magnitude, the scale, and for each element one of 256 levels of it: close
together near 0, seven decades deep (Dettmers 2022, arXiv:2110.02861, section 2.2). What was read back is written to the
same bytes again, so a checkpoint holds plain fp32 and a resume is exact. For that signed levels end at -1 and 1: those
published end at -0.993, which would shrink the scale of a block whose largest element is negative.

A second moment above 0 is never rounded to 0: the next step would divide by eps alone.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
CHUNK_ELEMENTS = {"cuda": 2**22, "cpu": 2**16}  # in fp32 at once, whole blocks; on a CPU what its cache holds
SMALLEST = 1e-30  # scale of a block of zeros, so that every level of every scale is a normal fp32 number


class Moment:
    """A moment of `numel` elements, all 0 at first: a byte each, and 4 bytes a block."""

    def __init__(self, numel: int, signed: bool, device: torch.device) -> None:
        self.signed = signed
        zero = int(_levels(signed).searchsorted(0.0))
        self.codes = torch.full((numel,), zero, dtype=torch.uint8, device=device)
        self.scales = torch.full((-(-numel // BLOCK),), SMALLEST, device=device)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in fp32; `start` begins a block."""
        levels = _tables(self.codes.device, self.signed).levels
        scales = self.scales[start // BLOCK : -(-stop // BLOCK)].repeat_interleave(BLOCK)
        return levels.index_select(0, self.codes[start:stop].int()).mul_(scales[: stop - start])

    def write(self, values: Tensor, start: int) -> None:
        """Round fp32 `values` to levels of their blocks, from `start`, which begins a block, to the end of one."""
        tables = _tables(self.codes.device, self.signed)
        stop = start + values.numel()
        blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1).clamp_(min=SMALLEST)
        ratios = (blocks / scales.unsqueeze(1)).view(-1)
        codes = tables.first.index_select(0, ratios.view(torch.int32) >> 16 & 0xFFFF)
        codes += ratios > tables.limits.index_select(0, codes)
        self.codes[start:stop] = codes[: values.numel()]
        self.scales[start // BLOCK : -(-stop // BLOCK)] = scales

    def copy_(self, values: Tensor) -> None:
        """Take all elements from fp32 `values`, on any device."""
        for start, stop in chunks(self.codes):
            self.write(values[start:stop].to(self.codes.device), start)


class Unpacked(Mapping[str, Tensor]):
    """What a slice keeps, some of it as `Moment`: asked for, that is a copy in fp32, made anew each time."""

    def __init__(self, kept: Mapping[str, Tensor | Moment]) -> None:
        self.kept = kept

    def __getitem__(self, kind: str) -> Tensor:
        one = self.kept[kind]
        if isinstance(one, Tensor):
            return one
        parts = [one.read(start, stop) for start, stop in chunks(one.codes)]
        return torch.cat(parts) if parts else one.scales

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def chunks(elements: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of a 1-D tensor to work on one after another: whole blocks, but for the end."""
    numel, most = elements.numel(), CHUNK_ELEMENTS[elements.device.type]
    return ((start, min(start + most, numel)) for start in range(0, numel, most))


@lru_cache
def _levels(signed: bool) -> Any:
    """The 256 levels in ascending order, fp32, the last of them 1.

    The decade below 10^-d is cut into 64 / 2^d equal parts, or 128 / 2^d unsigned, whose middles are levels.
    """
    positive = []
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (6 - decade + (0 if signed else 1)) + 1)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0**-decade)
    magnitudes = np.sort(np.concatenate(positive))
    below = -magnitudes[::-1] if signed else np.empty(0)
    levels = np.concatenate([below, [0.0], magnitudes, [1.0]])
    if signed:
        levels[0] = -1.0
    return levels.astype(np.float32)


class _Tables(NamedTuple):
    levels: Tensor  # (256,) fp32
    limits: Tensor  # (256,) fp32: what is above goes to the next level
    first: Tensor  # (65536,) int32: the lowest code of the numbers that begin with these 16 bits


@lru_cache
def _tables(device: torch.device, signed: bool) -> _Tables:
    """What codes are found by. Between numbers that agree in 16 bits lies one limit at most: levels are further apart.

    A search among the limits, as `torch.bucketize` makes it, takes a CPU eight times as long.
    """
    levels = _levels(signed)
    limits = np.append((levels[1:] + levels[:-1]) / 2, np.float32(np.inf))
    if not signed:
        limits[0] = 0.0
    begins = np.arange(2**16, dtype=np.uint32) << 16
    ends = np.stack([begins, begins + 0xFFFF]).view(np.float32)
    first = np.searchsorted(limits, ends).min(0).clip(max=255).astype(np.int32)  # what is no number comes last
    return _Tables(*(torch.from_numpy(table).to(device) for table in (levels, limits, first)))
