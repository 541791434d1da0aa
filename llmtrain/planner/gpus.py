"""Which GPUs are known, how much do they hold, and how fast are they at best?

Memory is what CUDA reports for the device, rounded down to a GiB. Rates and memory bandwidths are those of the vendors'
data sheets: bf16 of dense (not sparse) tensor cores, of which TF32 has half on all of these, and fp32 without them.
"""

from dataclasses import dataclass

from llmtrain.errors import ConfigError, did_you_mean

GIB = 2**30
UNUSED = 0.03  # of a GPU's memory: its driver's, and the allocator's gaps, which were under 1 GiB on an H200


@dataclass(frozen=True)
class Gpu:
    """One kind of device."""

    name: str
    memory: int  # bytes
    bf16_flops: float | None  # per second; None where it is not known
    fp32_flops: float | None = None  # per second, outside tensor cores
    bandwidth: float | None = None  # of memory, bytes a second

    @property
    def usable(self) -> int:
        """Bytes that tensors may take: the rest is the driver's, NCCL's and the allocator's."""
        return int(self.memory * (1 - UNUSED))

    def flops(self, precision: str) -> float | None:
        """FLOP/s at best in the precision of a run ("bf16", "tf32" or "fp32"); None where it is not known."""
        if precision == "fp32":
            return self.fp32_flops
        if self.bf16_flops is None:
            return None
        return self.bf16_flops if precision == "bf16" else self.bf16_flops / 2


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10", 21 * GIB, 125e12, 31.2e12, 0.6e12),
        Gpu("a100", 79 * GIB, 312e12, 19.5e12, 2.04e12),
        Gpu("a100-40gb", 39 * GIB, 312e12, 19.5e12, 1.56e12),
        Gpu("b200", 178 * GIB, 2250e12, 75e12, 8.0e12),
        Gpu("h100", 79 * GIB, 989e12, 67e12, 3.35e12),
        Gpu("h100-nvl", 93 * GIB, 835e12, 60e12, 3.9e12),
        Gpu("h100-pcie", 79 * GIB, 756e12, 51e12, 2.0e12),
        Gpu("h200", 139 * GIB, 989e12, 67e12, 4.8e12),
        Gpu("l4", 21 * GIB, 121e12, 30.3e12, 0.3e12),
        Gpu("l40s", 44 * GIB, 362e12, 91.6e12, 0.86e12),
    )
}

WITHOUT_FP8 = {"a10", "a100", "a100-40gb"}  # compute capability below 8.9


def find_gpu(
    name: str | None,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
    bandwidth_tb: float | None = None,
) -> Gpu:
    """The GPU of a plan: one that is known, by name, or any by its memory and, where time is asked for, its rates.

    The peak is dense bf16, in TFLOP/s, the memory bandwidth in TB/s. What is given wins over what is known of `name`.
    Without a name and a memory it is an h100. Raises ConfigError where the memory is not known, naming the nearest.
    """
    if name is None and memory_gib is None:
        if peak_tflops is not None or bandwidth_tb is not None:
            flag = "--gpu-bandwidth" if peak_tflops is None else "--gpu-peak"
            raise ConfigError(f"{flag} is that of which card? Give its --gpu-memory in GiB too, or --gpu NAME")
        return GPUS["h100"]
    known = None if name is None else GPUS.get(name.lower())
    if known is None and memory_gib is None:
        raise ConfigError(
            f'--gpu "{name}" is not known{did_you_mean((name or "").lower(), GPUS)}; any other card is planned by '
            "--gpu-memory in GiB, and in time by --gpu-peak (dense bf16, TFLOP/s) or --tokens-per-second"
        )
    return Gpu(
        known.name if known else name or f"{memory_gib:g} GiB GPU",
        known.memory if memory_gib is None and known else int((memory_gib or 0) * GIB),
        peak_tflops * 1e12 if peak_tflops is not None else known.bf16_flops if known else None,
        known.fp32_flops if known else None,
        bandwidth_tb * 1e12 if bandwidth_tb is not None else known.bandwidth if known else None,
    )
