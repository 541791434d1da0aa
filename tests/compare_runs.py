"""Run folders as training leaves them, for tests of comparisons: a config, its true rates, and losses as given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config_file import load_config, to_yaml
from llmtrain.schedules import plan

REPO = Path(__file__).parent.parent
UPDATES = 160
TOKENS = 4096  # of an update
LossOf = Callable[[np.ndarray], np.ndarray]  # k to loss


def falling(end: float) -> LossOf:
    """Losses that fall to `end` at the last update."""
    return lambda k: end + 4 * (1 / k - 1 / UPDATES)


def write_run(
    folder: Path,
    end: float,
    *overrides: str,
    seed: int = 1,
    updates: int = UPDATES,
    losses: LossOf | None = None,
    until: int | None = None,
    documents: np.ndarray | None = None,
    lr_factor: float = 1.0,
    **facts: Any,
) -> Path:
    """A run that ended at loss `end`, validated every 20 updates. `facts` replace those of its validation rows."""
    folder.mkdir(parents=True)
    words = [f"run.name={folder.name}", f"run.dir={folder}", f"run.seed={seed}", f"schedule.horizon={updates} steps"]
    config = load_config(REPO / "configs" / "demo_cosine.yaml", [*words, *overrides])
    (folder / "config.yaml").write_text(to_yaml(config))
    schedule = plan(config.schedule, config.batch.tokens, config.optim.betas[1])
    last = config.last_update if until is None else until
    k = np.arange(1, last + 1)
    trained = (losses or falling(end))(k)
    rates = config.schedule.peak * schedule.multipliers(k) * lr_factor
    shared = {
        "schedule": schedule.name,
        "schedule_hash": schedule.hash,
        **{"data_hash": "d", "tokenizer_hash": "t", "set_hash": "s", "model_hash": "m", "initial_weights": "random"},
        **{"set": "validation", "num_tokens": 1000, "attempt": 1, **facts},
    }
    lines = []
    every = max(updates // 8, 1)
    for step, loss, lr in zip(k.tolist(), trained.tolist(), rates.tolist(), strict=True):
        lines.append(
            f'{{"kind": "step", "step": {step}, "tokens": {step * TOKENS}, "loss": {loss if loss == loss else "NaN"}, '
            f'"lr": {lr}, "grad_norm": 1.0, "step_time_s": 0.5, "tokens_per_s": 8000.0, "attempt": 1}}'
        )
        if step % every == 0 or step == last:
            measured = end if step == config.last_update else loss
            known = {"step": step, "tokens": step * TOKENS, "lr": lr, "decayed": schedule.decayed(step)}
            scores = {"loss": measured, "perplexity": float(np.exp(measured)), "nats_per_byte": measured / 3}
            lines.append(json.dumps({"kind": "validation", **known, **scores, **shared}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if documents is not None:
        np.save(folder / "validation_documents.npy", documents)
    return folder
