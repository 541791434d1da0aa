"""What must two trainings share for one to continue the other?"""

import json
from pathlib import Path
from typing import Any

from llmtrain.config import Config
from llmtrain.errors import ConfigError

IMPORT_FILE = "import.json"


def trajectory_of(config: Config, data_hash: str) -> dict[str, Any]:
    """What shapes the loss at a given learning rate. A checkpoint is resumed only where this is equal.

    Engine, world size and micro-batch are not in it: they change nothing but rounding. The schedule has a hash of
    its own. Raises ConfigError where `run.init_from` is no folder of imported weights.
    """
    imported = {} if config.run.init_from is None else {"init_from": read_import(config.run.init_from)["weights_hash"]}
    rounded = {} if config.engine.fp8 == "none" else {"fp8": config.engine.fp8}
    return {
        **imported,
        **rounded,
        "seed": config.run.seed,
        "model": config.model.model_dump(mode="json", exclude={"preset"}),
        "data": data_hash,
        "document_mask": config.data.document_mask,
        "batch": {"sequences": config.batch.sequences, "seq_len": config.batch.seq_len},
        "optim": config.optim.model_dump(mode="json"),
        "precision": config.engine.precision,
    }


def read_import(folder: str) -> dict[str, Any]:
    """What `run.init_from` says of its weights: the hash of each (`weights`) and of all (`weights_hash`)."""
    path = Path(folder) / IMPORT_FILE
    remedy = f"write the folder with: llmtrain import HF_FOLDER {folder}"
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"run.init_from: cannot read {path}: {error.strerror}; {remedy}") from None
    except ValueError:
        values = None
    if not (isinstance(values, dict) and isinstance(values.get("weights"), dict) and values.get("weights_hash")):
        raise ConfigError(f"run.init_from: {path} is damaged: delete the folder, and {remedy}")
    return values
