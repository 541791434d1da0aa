"""The engines: one protocol (`base.py`), three ways to make an update."""

from llmtrain.config import Config
from llmtrain.distributed import World
from llmtrain.engines.base import Engine, Phase, unmarked


def build_engine(config: Config, world: World, phase: Phase = unmarked) -> Engine:
    """The engine that `config.engine.kind` names, its weights empty until `load`. `phase` marks an update's parts."""
    if config.engine.kind == "single":
        from llmtrain.engines.single import SingleEngine

        return SingleEngine(config, world, phase)
    if config.engine.kind == "fsdp":
        from llmtrain.engines.fsdp import FsdpEngine

        return FsdpEngine(config, world, phase)
    from llmtrain.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, world, phase)
