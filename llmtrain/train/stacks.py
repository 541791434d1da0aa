"""What is this process doing: at which line, in a collective or not, with which stacks?"""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

import llmtrain

PY_SPY_S = 20

_PACKAGE = str(Path(llmtrain.__file__).parent) + os.sep
_WATCHDOG = str(Path(__file__).with_name("watchdog.py"))
# Where a thread waits for other ranks. One that waits for its GPU (`Event.synchronize`) waits for what NCCL does there.
_COLLECTIVES = tuple(
    part.replace("/", os.sep)
    for part in ("/torch/distributed/", "/torch/cuda/streams.py", "/deepspeed/", "/llmtrain/distributed.py")
)


def doing(main: int) -> tuple[str, bool]:
    """The main thread's innermost line of llmtrain, and whether any thread is inside a collective."""
    frames = sys._current_frames()
    waits = any(_in_collective(frame) for thread, frame in frames.items() if thread != threading.get_ident())
    frame: FrameType | None = frames.get(main)
    while frame is not None and not _ours(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "", waits
    return _line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name), waits


def _ours(path: str) -> bool:
    return path.startswith(_PACKAGE) and path != _WATCHDOG


def _in_collective(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in _COLLECTIVES)


def raised_at(error: BaseException) -> str:
    """The innermost line of llmtrain that an error passed."""
    own = [entry for entry in traceback.extract_tb(error.__traceback__) if _ours(entry.filename)]
    return _line(own[-1].filename, own[-1].lineno or 0, own[-1].name) if own else ""


def _line(path: str, number: int, function: str) -> str:
    return f"{path.removeprefix(_PACKAGE)}:{number} {function}"


def native_stacks() -> str:
    """The stacks with those of C and C++, where py-spy is there to tell them."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return ""
    words = [program, "dump", "--native", "--pid", str(os.getpid())]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PY_SPY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"\npy-spy: {error}\n"
    return f"\n{done.stdout}{done.stderr}"


def flight_recorder() -> str:
    """The last collectives of this rank as JSON, where this torch keeps them."""
    module = importlib.import_module("torch._C._distributed_c10d")
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        with contextlib.suppress(AttributeError, RuntimeError, TypeError):
            recorded = getattr(module, name)()
            return recorded.decode() if isinstance(recorded, bytes) else str(recorded)
    return ""
