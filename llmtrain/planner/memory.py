"""How much memory does a rank need, for what, and at which moment of an update?

The engine's part (`state`) and the micro-batch's (`activations`) are added up moment by moment; what counts is the
moment that needs most. Bytes are those of tensors: what the driver and the allocator take is `gpus.Gpu.usable`'s.
"""

from dataclasses import dataclass
from typing import Literal

from llmtrain.config import Config
from llmtrain.errors import ConfigError
from llmtrain.planner.activations import block_bytes, micro_batch
from llmtrain.planner.state import FP32, KINDS, Bytes, copy_ranks, holdings, kept_moment_bytes, moment_bytes, sizes

Moment = Literal["forward", "backward", "reduce", "update"]


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most. `at` is the moment that needs most, `kinds` what is there then."""

    at: Moment
    kinds: Bytes
    moments: dict[Moment, int]
    host: Bytes

    @property
    def total(self) -> int:
        """Bytes on the device at the moment that needs most."""
        return self.moments[self.at]


def memory(config: Config, ranks: int, device: Literal["cuda", "cpu"] = "cuda") -> Memory:
    """What `config` needs on one of `ranks` ranks. Raises ConfigError as training would, where that is impossible."""
    check_ranks(config, ranks)
    held = holdings(config, ranks, device)
    work = micro_batch(config, device)
    moments_here = held.host.get("moments", 0) + held.always.get("moments", 0)
    elements = sizes(config)
    weights = moments_here * FP32 * sum(elements.values()) // kept_moment_bytes(elements, config)
    saved = moments_here * moment_bytes(elements, config) // kept_moment_bytes(elements, config)
    always = dict(held.always)
    host = dict(held.host)
    if config.validation.ema_window is not None:
        (host if "moments" in held.host else always)["average"] = weights
    if config.checkpoint.async_save:
        host["checkpoint"] = saved + weights * (1 if config.validation.ema_window is None else 2)
    at: dict[Moment, Bytes] = {
        "forward": _sum(always, held.forward, work.forward),
        "backward": _sum(always, held.backward, work.backward),
        "reduce": _sum(always, held.reduce, {"activations": block_bytes(config, device)}),
        "update": _sum(always, held.update),
    }
    moments = {moment: sum(kinds.values()) for moment, kinds in at.items()}
    most = max(moments, key=lambda moment: moments[moment])
    return Memory(most, at[most], moments, host)


def check_ranks(config: Config, ranks: int) -> None:
    """Raise ConfigError where so many ranks cannot run `config`: the same mistakes that training refuses."""
    engine = config.engine
    if engine.kind == "single" and ranks != 1:
        raise ConfigError(
            f'engine.kind "single" runs on one rank, but there are {ranks}: '
            "use --set engine.kind=fsdp or --set engine.kind=deepspeed"
        )
    if engine.kind == "fsdp" and ranks % copy_ranks(config, ranks):
        raise ConfigError(f"engine.shard_ranks {engine.shard_ranks} does not divide the {ranks} ranks")
    config.batch.accumulation(ranks)


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Bytes of one checkpoint: weights and moments in fp32, and the average where there is one."""
    weights = parameters * FP32 * (1 if config.validation.ema_window is None else 2)
    return weights + moment_bytes(sizes(config), config)


def _sum(*parts: Bytes) -> Bytes:
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in KINDS}
