"""How is a checkpoint written while training goes on?

The state is copied to a buffer in host memory, pinned where a GPU copies into it, which is all that training waits for;
a thread writes from there. There is one buffer, taken once, so memory does not grow with saves, and the next save
waits for the last. A write that failed is told at once and tried again from the same buffer until
it works, or until the next save brings newer state. What else ends the thread is raised by the next save.
"""

import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.checkpoint.places import name_of
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.engines.base import FlatState

RETRY_S, RETRY_AT_MOST_S = 2.0, 60.0
LAST_SAVE_PATIENCE_S = 60.0  # for how long a run at its end goes on trying
ABANDONED_S = 30.0  # for how long a run that failed waits for a save that is under way


class Saver:
    """Saves one run. Its methods are collective, and `store` is used by its thread alone from now on.

    `say` gets a line for every save that is published and every one that failed, from the thread.
    """

    def __init__(
        self, store: CheckpointStore, flat: FlatState, say: Callable[[str], None], *, background: bool
    ) -> None:
        self.store = store
        self.say = say
        self.staging = _staging(flat) if background else None
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()  # ends the wait before a retry
        self._give_up_at = float("inf")  # when a failing save is no longer tried again, by time.monotonic()
        self._problem: str | None = None  # of the last save
        self._error: BaseException | None = None  # of the thread

    def save(
        self,
        flat: FlatState,
        state: dict[str, Any],
        metadata: dict[str, str],
        unready: Callable[[], str],
        *,
        ephemeral: bool,
    ) -> None:
        """Save this state. In the background, this returns once the last save has ended and the state is copied.

        `unready` is asked before every attempt, and tells what keeps this rank from saving, if anything does.
        """
        self._join(patience_s=0.0)
        if self.staging is not None:
            flat = _stage(flat, self.staging)

        def attempt() -> str | None:
            return self.store.save(flat, state, unready(), metadata=metadata, ephemeral=ephemeral)

        if self.staging is None:
            self._tell(flat.update, attempt(), "training goes on")
            return
        self._give_up_at = float("inf")
        self._hurry.clear()
        self._thread = threading.Thread(target=self._work, args=(flat.update, attempt), name="saver", daemon=True)
        self._thread.start()

    def finish(self) -> str | None:
        """Wait for the last save. Returns what went wrong with it, None where it is published."""
        self._join(patience_s=LAST_SAVE_PATIENCE_S)
        return self._problem

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """A save under way is a good one, even where training failed: let it end, if the other ranks let it."""
        if self._thread is not None:
            self._give_up_at = 0.0
            self._hurry.set()
            self._thread.join(ABANDONED_S)

    def _work(self, update: int, attempt: Callable[[], str | None]) -> None:
        delay = RETRY_S
        try:
            while True:
                self._tell(update, attempt(), "it is tried again while training goes on")
                if self._problem is None:
                    return
                self._hurry.wait(delay)
                self._hurry.clear()
                if self.store.world.any(time.monotonic() >= self._give_up_at):
                    return
                ending = self._give_up_at < float("inf")
                delay = RETRY_S if ending else min(2 * delay, RETRY_AT_MOST_S)
        except BaseException as error:
            self._error = error

    def _join(self, patience_s: float) -> None:
        """Wait for the thread; a save that fails is given up once it was tried for so long from now."""
        if self._thread is not None:
            self._give_up_at = time.monotonic() + patience_s
            self._hurry.set()
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _tell(self, update: int, problem: str | None, then: str) -> None:
        self._problem = problem
        if problem is None:
            self.say(f"step {update}  saved {self.store.place.where(name_of(update))}")
        else:
            self.say(f"step {update}  NOT SAVED, {then}: {problem}")


Staging = dict[tuple[str, str], Tensor]  # views into one buffer, by parameter and kind


def _staging(flat: FlatState) -> Staging:
    """Host memory for this rank's share, touched now, so that memory that is not there is missed at the start.

    It is one buffer of just that size, pinned where it is for a GPU. Pinned by torch's allocator, it would take the
    next power of two, and so would each slice alone.
    """
    shapes = [
        (piece.name, kind, tensor.dtype, tensor.nbytes, tensor.is_cuda)
        for piece in flat.share()
        for kind, tensor in piece.tensors.items()
    ]
    buffer = torch.zeros(sum(size for *_, size, _ in shapes), dtype=torch.uint8).fill_(0)
    if any(on_gpu for *_, on_gpu in shapes):
        _pin(buffer)
    staging, at = {}, 0
    for name, kind, dtype, size, _ in shapes:
        staging[name, kind] = buffer[at : at + size].view(dtype)
        at += size
    return staging


def _pin(buffer: Tensor) -> None:
    """Lock a buffer's pages in memory, where a GPU writes into them by itself, until the buffer is no longer used."""
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(cuda.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
    weakref.finalize(buffer.untyped_storage(), cuda.cudaHostUnregister, buffer.data_ptr())


def _stage(flat: FlatState, staging: Staging) -> FlatState:
    """This rank's share of the state, copied into the buffer."""
    slices, on_gpu = [], False
    for piece in flat.share():
        copies = {kind: staging[piece.name, kind] for kind in piece.tensors}
        for kind, tensor in piece.tensors.items():
            if tensor.is_cuda:
                on_gpu = True
                copies[kind].copy_(tensor, non_blocking=True)
            else:  # by one thread: waking several for each slice costs more than it gains
                np.copyto(copies[kind].view(torch.uint8).numpy(), tensor.detach().view(torch.uint8).numpy())
        slices.append(piece._replace(tensors=copies))
    if on_gpu:
        torch.cuda.synchronize()
    return FlatState(slices, flat.update)
