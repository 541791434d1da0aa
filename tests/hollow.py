"""How does an engine run whose tensors would not fit in memory?

With every allocation made and nothing large computed: inside `Hollow`, an operation on a large tensor allocates its
result, of the size, type and strides that torch's shape functions give, and leaves it unwritten; one that writes into
a large tensor does nothing. A fresh page that nobody writes takes no memory and reads as zeros. Engines, DeepSpeed,
FSDP2 and autograd run their own code and hold the storages they would hold. A small result of large tensors is all
ones, or false.

`alone` is one rank of a group whose other ranks do not exist: its collectives end at once, with its own part alone.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from llmtrain.distributed import World

LARGE = 2**16  # elements
FRESH_FROM = -3  # glibc's M_MMAP_THRESHOLD
AGREES = "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks"
GROWING = {"mm", "embedding_dense_backward"}  # large results of small tensors
COMPUTED = {"set_", "resize_", "_unsafe_view", "lift_fresh"}  # these allocate nothing of their own, or what they say


class Hollow(TorchDispatchMode):
    """Operations on large tensors allocate and do not compute. From the first one on, this process asks the kernel for
    every large piece of memory, because what it used before holds numbers that are not finite.
    """

    def __enter__(self) -> "Hollow":
        ctypes.CDLL(None).mallopt(FRESH_FROM, LARGE)
        return super().__enter__()  # type: ignore[no-any-return]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            return NotImplemented  # then it asks again, for its local tensors
        name = func._schema.name.removeprefix("aten::")
        large = any(tensor.numel() >= LARGE for tensor in tensors)
        makes = any(argument.name == "device" for argument in func._schema.arguments)
        grows = makes or name in GROWING
        real = (
            func.namespace not in ("aten", "fsdp")
            or name == "fsdp::all_gather_copy_in"
            or func.is_view
            or name in COMPUTED
            or any(t.is_meta for t in tensors)
        )
        if real or not (large or grows) or torch.device(kwargs.get("device") or "cpu").type == "meta":
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return _written(func, args, kwargs)
        shaped = _shape(func, args, kwargs, makes)
        if not large and all(leaf.numel() < LARGE for leaf in tree_leaves(shaped) if isinstance(leaf, Tensor)):
            return func(*args, **kwargs)
        return tree_map_only(Tensor, _unwritten, shaped)


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns that writes into its arguments: those of them that it names."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    names = [argument.name for argument in func._schema.arguments if argument.alias_info is not None]
    returned = tuple(given[name] for name, _ in zip(names, func._schema.returns, strict=False))
    assert len(returned) == len(func._schema.returns), f"{func} returns more than it writes"
    return returned[0] if len(returned) == 1 else returned or None


def _shape(func: Any, args: Any, kwargs: Any, makes: bool) -> Any:
    """What an operation returns, without storage."""
    if makes:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": "meta"}
    args, kwargs = tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), (args, kwargs)
    )
    return func(*args, **kwargs)


def _unwritten(shaped: Tensor) -> Tensor:
    """A tensor on the CPU with the shape of one that has no storage."""
    made = torch.empty_strided(shaped.shape, shaped.stride(), dtype=shaped.dtype)
    return made if made.numel() >= LARGE else made.fill_(shaped.is_floating_point())


@contextmanager
def alone(rank: int, size: int) -> Iterator[World]:
    """Rank `rank` of `size`, the only one there is."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with mock.patch(AGREES, lambda ints: None):
            yield World(rank, size, rank, torch.device("cpu"), size)
    finally:
        dist.destroy_process_group()
