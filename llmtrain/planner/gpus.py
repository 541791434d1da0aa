"""Which GPUs are known, how much do they hold, and how fast are they at best?

Memory is what CUDA reports for the device, rounded down to a GiB. Rates are the vendors' data sheets, dense (not
sparse) tensor cores; fp32 runs multiply in TF32, which is half the bf16 rate on all of these.
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

    @property
    def usable(self) -> int:
        """Bytes that tensors may take: the rest is the driver's, NCCL's and the allocator's."""
        return int(self.memory * (1 - UNUSED))

    def flops(self, precision: str) -> float | None:
        """FLOP/s at best in the precision of a run."""
        if self.bf16_flops is None:
            return None
        return self.bf16_flops if precision == "bf16" else self.bf16_flops / 2


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10", 21 * GIB, 125e12),
        Gpu("a100", 79 * GIB, 312e12),
        Gpu("a100-40gb", 39 * GIB, 312e12),
        Gpu("b200", 178 * GIB, 2250e12),
        Gpu("h100", 79 * GIB, 989e12),
        Gpu("h100-nvl", 93 * GIB, 835e12),
        Gpu("h100-pcie", 79 * GIB, 756e12),
        Gpu("h200", 139 * GIB, 989e12),
        Gpu("l4", 21 * GIB, 121e12),
        Gpu("l40s", 44 * GIB, 362e12),
    )
}


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The GPU called `name`, with another memory where one is given. Raises ConfigError naming the nearest."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(
            f'--gpu "{name}" is not known{did_you_mean(name.lower(), GPUS)}; for another one give --gpu-memory in GiB '
            "and the rate it reaches by --tokens-per-second"
        )
    return gpu if memory_gib is None else Gpu(gpu.name, int(memory_gib * GIB), gpu.bf16_flops)
