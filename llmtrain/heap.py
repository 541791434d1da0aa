"""What becomes of memory that a CPU's tensors no longer need?

By itself glibc gives it back to the system after every backward pass and asks for it again in the next forward, which
costs a page fault for each 4 KiB: ten thousand an update of a model of 5 million parameters, 3 to 5 % of its time. An
update needs what the last one needed, so it is kept.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_KEPT = 2**30  # bytes; older versions of glibc take 32 MiB at most, else they stay as they are


def keep_freed_memory() -> None:
    """From here on this process keeps the memory of freed tensors below 1 GiB for the next ones. Linux with glibc."""
    if sys.platform != "linux":
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_KEPT)
        set_option(_TRIM_THRESHOLD, -1)
