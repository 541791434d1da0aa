"""In which state are the random generators of this rank?

Nothing of ours draws from them: the data order, the initial weights and the batches are functions of the seed alone.
What a user adds (dropout, augmentation) does, so every rank starts them from (seed, rank), saves them with each
checkpoint as text, and restores them as the last act before the next update.
"""

import base64
import hashlib
import json
import random

import numpy as np
import torch

from llmtrain.errors import CheckpointError

METADATA_KEY = "rng"


def seed_generators(seed: int, rank: int) -> None:
    """Start Python's, NumPy's and torch's generators of this rank."""
    random.seed(f"{seed} {rank}")
    own = int.from_bytes(hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=4).digest(), "little")
    np.random.seed(own)
    torch.manual_seed(own)


def capture(device: torch.device) -> str:
    """All generators as JSON text."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }
    return json.dumps(state, separators=(",", ":"))


def restore(text: str, device: torch.device) -> None:
    """Put back what `capture` returned. Raises CheckpointError where it is not that."""
    try:
        state = json.loads(text)
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(_tensor(state["torch"]))
        if device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(_tensor(state["cuda"]), device)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's generator state is not readable: {error}") from None


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
