"""Who tokenizes the units? This process, or as many others as are wanted, none of which outlives it."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from llmtrain.data.unit import UnitPlace, UnitRecord, tokenize_unit
from llmtrain.errors import DataError

Submit = Callable[[UnitPlace, list[str]], "Future[UnitRecord]"]


@contextmanager
def unit_pool(workers: int) -> Iterator[Submit]:
    """Something that tokenizes units, in this process where one worker is wanted. A worker that dies is an error."""
    if workers == 1:
        yield _here
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield lambda place, texts: pool.submit(tokenize_unit, place, texts)
        except BrokenProcessPool:
            if sys.version_info < (3, 12):
                _unblock(pool)
            raise DataError(
                "a worker process died, most often because memory ran out. What is finished is kept: run the same "
                "command again with fewer --workers or a smaller data.shard_bytes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _unblock(pool: Any) -> None:
    """Let the thread that writes texts to workers fail: the pool waits for it, and no worker reads any more.

    Python 3.12 does so itself (github.com/python/cpython/issues/94777).
    """
    pool._call_queue._reader.close()


def _here(place: UnitPlace, texts: list[str]) -> "Future[UnitRecord]":
    future: Future[UnitRecord] = Future()
    future.set_result(tokenize_unit(place, texts))
    return future


def _end_with_parent() -> None:
    """In a worker: end at once on Ctrl-C, and when the parent is killed, which leaves no time to say so."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
