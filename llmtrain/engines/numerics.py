"""In which arithmetic does a process compute, and are its bits the same each time?

These settings are torch's own and hold for the whole process. An engine sets them before it builds anything.

fp32 is fp32: on a GPU products round their operands to TF32 only where `engine.precision: tf32` says so. On a CPU they
may use what bf16 instructions it has (`medium`), whose sums of parts are fp32 again; fp32 attention does not, being
faster without (`llmtrain.model.cpu_attention`).

A GPU's fastest kernels sum with atomics, in an order that differs from run to run. With `engine.deterministic` torch
takes others, cuBLAS keeps workspaces apart, and the compiler chooses by shapes alone, never by the clock. An operation
that has no such kernel raises before it computes, and `named` says which.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmtrain.config import Config
from llmtrain.errors import ConfigError
from llmtrain.model.kernels import choose_kernel, use_kernel

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_APART = ":4096:8"  # NVIDIA's documentation of cuBLAS, "Results reproducibility"


def set_numerics(config: Config, device: torch.device) -> None:
    """Make this process compute as `config` says. Raises ConfigError where its attention kernel is not there."""
    on_gpu = device.type == "cuda"
    products = {"bf16": "high", "tf32": "high", "fp32": "highest"}[config.engine.precision]
    torch.set_float32_matmul_precision(products if on_gpu else "medium")
    deterministic = config.engine.deterministic
    if deterministic and on_gpu:
        os.environ.setdefault(CUBLAS, CUBLAS_APART)
    torch.use_deterministic_algorithms(deterministic)
    # Memory that nothing wrote is never read here, so it need not be filled to be the same each time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic:
        import torch._inductor.config as inductor

        inductor.deterministic = True
    if on_gpu:
        use_kernel(choose_kernel(config).kernel)


def described(config: Config, device: torch.device) -> list[str]:
    """What the banner says of it: nothing on a CPU, where every kernel gives the same bits each time."""
    if device.type != "cuda":
        return []
    kernel, reason = choose_kernel(config)
    lines = [f"attention: {kernel} ({reason})"]
    if config.engine.precision == "tf32":
        lines.append("products of fp32 matrices in TF32 (10 bits of mantissa)")
    if not config.engine.deterministic:
        compiled = ", reductions that the compiler chose by the clock" if config.engine.compile else ""
        lines.append(
            f"not reproducible to the last bit: attention's backward pass{compiled} "
            "(engine.deterministic: true makes it so)"
        )
    return lines


@contextmanager
def named() -> Iterator[None]:
    """Raise ConfigError, naming the operation, where it has no deterministic kernel and one is asked for."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "deterministic implementation" not in text:
            raise
        operation = text.split(" does not have", 1)[0].split()[-1]
        raise ConfigError(
            f"engine.deterministic: {operation} has no deterministic kernel on this device: write "
            f"--set engine.deterministic=false, or choose other settings that do without it"
        ) from error
