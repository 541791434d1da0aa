"""llmtrain: the engine, batches of its own kind, and what its loop does with an update: read the loss, write a row."""

import os
import tempfile
from pathlib import Path

from llmtrain.config_file import validate
from llmtrain.data.batches import Batch
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import StepStats
from llmtrain.train.late import Late
from llmtrain.train.metrics import MetricsLog
from llmtrain.train.start import InitialValues
from tests.benchmarks.peers.work import (
    BETAS,
    CLIP,
    DECAY,
    FFN,
    HEADS,
    LAYERS,
    MICRO,
    PEAK,
    SEQ,
    VOCAB,
    WIDTH,
    asked,
    pairs,
)


def main() -> None:
    want = asked()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    engine = {"kind": "single" if ranks == 1 else "fsdp"}
    if want.stage:
        engine = {"kind": "deepspeed", "zero_stage": want.stage}
    config = validate(
        {
            "run": {"name": "peer"},
            "model": {
                "hidden_size": WIDTH,
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "ffn_size": FFN,
                "vocab_size": VOCAB,
                "max_seq_len": SEQ,
            },
            "data": {"path": "none", "tokenizer": {"kind": "sentencepiece", "vocab_size": VOCAB}},
            "batch": {"global_sequences": MICRO * ranks, "micro": MICRO, "seq_len": SEQ},
            "optim": {"betas": BETAS, "weight_decay": DECAY, "clip": CLIP},
            "schedule": {"name": "constant", "peak": PEAK, "horizon": "1000000 steps"},
            "engine": {**engine, "precision": want.precision, "compile": want.compile},
        },
        "peer",
    )
    log = MetricsLog(Path(tempfile.mkdtemp()))

    def record(k: int, stats: StepStats, seconds: float) -> None:
        row = {"kind": "step", "step": k, "loss": stats.loss.item(), "grad_norm": stats.grad_norm.item(), "s": seconds}
        log.append(row)

    with open_world(600, collectives=config.engine.kind != "single") as world:
        trained = build_engine(config, world)
        trained.load(InitialValues(config), 0)
        late = Late(world.device, record)
        for k, (tokens, targets) in enumerate(pairs(), start=1):
            late.start()
            late.made(k, trained.train_step([Batch(tokens, targets)], 1.0))


main()
