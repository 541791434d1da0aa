"""Weights & Biases as a mirror of metrics.jsonl that can never hurt the run.

One wandb run across resumes, by an id kept in the run folder. Rows carry their own step (`trainer/step`), so that a
resume from an older update loses none. Everything happens on a thread: a slow or dead service costs a warning, not a
step.
"""

import contextlib
import inspect
import queue
import secrets
import threading
import warnings
from pathlib import Path
from typing import Any

from llmtrain.config import Config

CLOSE_TIMEOUT_S = 60.0
_QUEUE_ROWS = 10_000


class WandbMirror:
    """Sends rows to wandb from a thread; does nothing when wandb is disabled. Only the first rank has one."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.rows: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_ROWS)
        self.thread: threading.Thread | None = None
        self.run_id = ""
        if config.logging.wandb.mode != "disabled":
            self.run_id = _run_id(run_dir)
            self.thread = threading.Thread(target=self._send, args=(config, run_dir), name="wandb", daemon=True)
            self.thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Queue one metrics row; dropped where wandb has fallen far behind (metrics.jsonl has it)."""
        if self.thread is not None and self.thread.is_alive():
            try:
                self.rows.put_nowait(row)
            except queue.Full:
                self.thread = None
                warnings.warn("wandb does not keep up: logging goes on in metrics.jsonl alone", stacklevel=2)

    def close(self) -> None:
        """Let the thread finish, for a minute at most."""
        if self.thread is None:
            return
        with contextlib.suppress(queue.Full):
            self.rows.put(None, timeout=1)
            self.thread.join(CLOSE_TIMEOUT_S)
        if self.thread.is_alive():
            warnings.warn("wandb did not finish in time: metrics.jsonl has every row", stacklevel=2)

    def _send(self, config: Config, run_dir: Path) -> None:
        try:
            run = _start(config, run_dir, self.run_id)
            while (row := self.rows.get()) is not None:
                run.log(_named(row))
            run.finish()
        except BaseException as error:  # wandb raises SystemExit and its own kinds too
            warnings.warn(f"wandb: {error}; logging goes on in metrics.jsonl alone", stacklevel=2)


def _start(config: Config, run_dir: Path, run_id: str) -> Any:
    import wandb

    chosen = config.logging.wandb
    mode = chosen.mode
    if mode == "online" and not _has_credentials(wandb):
        warnings.warn("wandb: no API key (run `wandb login`): this run is logged offline", stacklevel=2)
        mode = "offline"
    run = wandb.init(
        id=run_id,
        resume="allow" if mode == "online" else None,
        mode=mode,
        project=chosen.project,
        entity=chosen.entity,
        group=chosen.group,
        tags=chosen.tags,
        name=config.run.name,
        dir=str(run_dir),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(init_timeout=120, console="off", silent=True),
    )
    run.define_metric("trainer/step")
    run.define_metric("*", step_metric="trainer/step")
    return run


def _has_credentials(wandb: Any) -> bool:
    """Whether it can log in without asking: a prompt would wait for ever in a job."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # as older versions tell it


def _named(row: dict[str, Any]) -> dict[str, Any]:
    place = f"validation/{row['set']}" if row["kind"] == "validation" else "train"
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    return {"trainer/step": row["step"], **{f"{place}/{key}": value for key, value in numbers.items()}}


def _run_id(run_dir: Path) -> str:
    """The wandb id of this run folder, made once."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
