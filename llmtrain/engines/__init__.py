"""The engines: one protocol (`base.py`), three ways to make an update."""

import gc

from llmtrain.config import Config
from llmtrain.distributed import World
from llmtrain.engines.base import Engine, Phase, unmarked
from llmtrain.engines.numerics import set_numerics


def build_engine(config: Config, world: World, phase: Phase = unmarked) -> Engine:
    """The engine that `config.engine.kind` names, its weights empty until `load`. `phase` marks an update's parts.

    From here on the process computes in the config's arithmetic.
    """
    set_numerics(config, world.device)
    if config.engine.kind == "single":
        from llmtrain.engines.single import SingleEngine

        _collect_from_here_on()
        return SingleEngine(config, world, phase)
    if config.engine.kind == "fsdp":
        from llmtrain.engines.fsdp import FsdpEngine

        _collect_from_here_on()
        return FsdpEngine(config, world, phase)
    from llmtrain.engines.deepspeed import DeepSpeedEngine

    _collect_from_here_on()
    return DeepSpeedEngine(config, world, phase)


def _collect_from_here_on() -> None:
    """Look for garbage again where that was put off while modules were imported, and not among what they made."""
    if not gc.isenabled():
        import torch._dynamo  # noqa: F401, any optimizer does with its first update

        gc.freeze()
        gc.enable()
