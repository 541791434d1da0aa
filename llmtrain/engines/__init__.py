"""The engines: one protocol (`base.py`), three ways to make an update."""

from llmtrain.config import Config
from llmtrain.distributed import World
from llmtrain.engines.base import Engine


def build_engine(config: Config, world: World) -> Engine:
    """The engine that `config.engine.kind` names. Its weights are empty until `load`."""
    if config.engine.kind == "single":
        from llmtrain.engines.single import SingleEngine

        return SingleEngine(config, world)
    if config.engine.kind == "fsdp":
        from llmtrain.engines.fsdp import FsdpEngine

        return FsdpEngine(config, world)
    from llmtrain.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, world)
