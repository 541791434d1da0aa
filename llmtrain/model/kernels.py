"""Which attention kernel computes, on this GPU, for these shapes?

By a table that was measured (`tests/benchmarks/attention.py`, its results beside it): milliseconds forward and backward
of every kernel that is there, at the nearest head size and sequence. Attention within documents is FlexAttention's,
which alone skips what no document spans. Kernels that sum with atomics, cuDNN's and FlashAttention 2's in their faster
form, give other last bits each time; where every bit must be the same, their times are those of the form that does not.
"""

import math
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from llmtrain.config import Config
from llmtrain.errors import ConfigError

Kernel = Literal["cudnn", "flash", "flash3", "flash4", "flex", "efficient"]

FAST: tuple[Kernel, ...] = ("cudnn", "flash", "flash3", "flash4", "flex")

PACKAGES: dict[Kernel, str] = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}


class Measured(NamedTuple):
    """Milliseconds of one layer's attention, forward and backward, by kernel."""

    head_size: int
    seq_len: int
    deterministic: bool
    milliseconds: dict[str, float]


# One NVIDIA H200, torch 2.11.0+cu130, cuDNN 9.19, bf16, 16,384 tokens.
MEASURED = (
    Measured(64, 512, False, {"cudnn": 0.41, "flash": 0.39, "flex": 0.97}),
    Measured(64, 2048, False, {"cudnn": 0.69, "flash": 0.89, "flex": 1.36}),
    Measured(64, 4096, False, {"cudnn": 2.55, "flash": 3.91, "flex": 3.97}),
    Measured(128, 2048, False, {"cudnn": 2.17, "flash": 3.68, "flex": 3.48}),
    Measured(128, 8192, False, {"cudnn": 6.96, "flash": 12.62}),
    Measured(64, 512, True, {"flash": 0.38, "flex": 0.97}),
    Measured(64, 2048, True, {"cudnn": 0.72, "flash": 1.07, "flex": 1.36}),
    Measured(64, 4096, True, {"cudnn": 2.93, "flash": 4.02, "flex": 3.97}),
    Measured(128, 2048, True, {"cudnn": 2.24, "flash": 3.69, "flex": 3.48}),
    Measured(128, 8192, True, {"cudnn": 7.77, "flash": 16.14}),
)
CUDNN_HEADS = 128  # largest head size of cuDNN's backward pass on all GPUs
DETERMINISTIC_CUDNN = (9, 0)  # compute capability: Hopper and newer


class Choice(NamedTuple):
    """The kernel, and why it."""

    kernel: Kernel
    reason: str


def choose_kernel(config: Config) -> Choice:
    """The kernel of a run on a GPU. Raises ConfigError where the one asked for is not there, or cannot do it."""
    asked, engine = config.engine.attention, config.engine
    if asked != "auto":
        _require(config, asked)
        return Choice(asked, "engine.attention")
    if config.data.document_mask:
        return Choice("flex", "within documents")
    if engine.precision != "bf16":
        return Choice("efficient", f"the only one for {engine.precision}")
    usable = [kernel for kernel in FAST if not _problem(config, kernel)]
    rows = [row for row in MEASURED if row.deterministic == engine.deterministic]
    row = min(rows, key=lambda row: _distance(row, config))
    times: dict[Kernel, float] = {kernel: row.milliseconds[kernel] for kernel in usable if kernel in row.milliseconds}
    fastest = min(times, key=lambda kernel: times[kernel])
    listed = ", ".join(f"{kernel} {time:g}" for kernel, time in sorted(times.items(), key=lambda item: item[1]))
    reason = f"fastest as measured at head size {row.head_size}, sequence {row.seq_len}, in ms: {listed}"
    return Choice(fastest, reason)


def use_kernel(kernel: Kernel) -> None:
    """Let `scaled_dot_product_attention` take this kernel on GPUs, and where it cannot the ones that always can."""
    backends = torch.backends.cuda
    backends.enable_cudnn_sdp(kernel == "cudnn")
    backends.enable_flash_sdp(kernel in ("flash", "flash3", "flash4"))
    backends.enable_mem_efficient_sdp(True)
    backends.enable_math_sdp(True)
    if kernel in PACKAGES:
        torch.nn.attention.activate_flash_attention_impl({"flash3": "FA3", "flash4": "FA4"}[kernel])


def _require(config: Config, kernel: Kernel) -> None:
    problem = _problem(config, kernel)
    if problem:
        raise ConfigError(f'engine.attention "{kernel}": {problem}; leave it out, or write engine.attention: auto')


def _problem(config: Config, kernel: Kernel) -> str:
    """Why a kernel cannot compute this run's attention, or nothing."""
    if config.engine.precision != "bf16" and kernel in FAST:
        return f"it computes in bf16, and engine.precision is {config.engine.precision}"
    if config.data.document_mask and kernel != "flex":
        return "only flex stays within documents (data.document_mask)"
    if kernel == "cudnn" and (config.model.head_size > CUDNN_HEADS or config.model.head_size % 8):
        return f"cuDNN takes heads of 8, 16, ... {CUDNN_HEADS}, and these have {config.model.head_size}"
    if kernel == "cudnn" and config.engine.deterministic:
        return _deterministic_cudnn_problem()
    if kernel in PACKAGES and not _importable(PACKAGES[kernel]):
        return f"its package {PACKAGES[kernel]} is not installed"
    return ""


def _deterministic_cudnn_problem() -> str:
    if not _importable("cudnn"):
        return "its deterministic form needs cuDNN's frontend: pip install 'llmtrain[cudnn]'"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < DETERMINISTIC_CUDNN:
        return "its deterministic form needs a Hopper GPU or newer (engine.deterministic)"
    return ""


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _distance(row: Measured, config: Config) -> tuple[int, float]:
    """How far a row is from a run: in head size first, then in the length of sequences."""
    return abs(row.head_size - config.model.head_size), abs(math.log2(row.seq_len / config.batch.seq_len))
