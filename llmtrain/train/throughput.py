"""How fast is a device at best? Peak dense bf16 rates by exact device name, for MFU.

An unknown device has no peak, and a run on it no MFU, rather than a wrong one. Sources: the vendors' data sheets, dense
(not sparse) tensor-core rates.
"""

import sys

import torch

PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of `device` in bf16, or None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))


def memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    units = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units
