"""What does a run cost before it starts: memory, time, FLOPs, disk?

Model FLOPs utilisation (MFU) turns FLOPs into time: it is measured by a run or a benchmark on the same kind of GPU, or
assumed, and the plan says which. Recomputed blocks cost time that MFU does not count (about a third more FLOPs). Beside
it stands what `speed` expects of the config, and of the fastest choice that fits.
"""

from dataclasses import dataclass

from llmtrain.config import Config
from llmtrain.model.size import flops_per_token, parameter_count
from llmtrain.planner.activations import recomputed_blocks
from llmtrain.planner.fit import Change, Layout, changes, largest_micro, layouts
from llmtrain.planner.gpus import GIB, Gpu
from llmtrain.planner.memory import Memory, checkpoint_bytes, memory
from llmtrain.planner.speed import Recommendation, Speed, expected, fp8_words, recommended, unknown

ASSUMED_MFU = 0.4
FLOPS_FORMULA = "6 N + 12 L H Q T, N without the embedding that is only looked up"
TIGHT = 0.95


@dataclass(frozen=True)
class Pace:
    """How long the run takes. `source` says where the speed is from."""

    source: str
    mfu: float | None
    tokens_per_second: float  # of all ranks
    step_seconds: float
    days: float


@dataclass(frozen=True)
class Disk:
    """What checkpoints take. `seconds` is one save at the bandwidth of the whole job."""

    checkpoint: int  # bytes
    every: int | None  # updates
    kept: int  # checkpoints, at the end of the run
    peak: int  # bytes, with the one that is being written
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The answer. Bytes are of one rank where nothing else is said."""

    gpu: Gpu
    ranks: int
    parameters: int
    memory: Memory
    fits: bool
    largest_micro: int | None
    accumulation: int
    tokens_per_update: int
    flops_per_token: int
    updates: int
    pace: Pace | None
    expected: Speed | None  # of the config as it is
    recommended: Recommendation | None
    unexpected: str  # why no speed is expected, or nothing
    disk: Disk
    layouts: list[Layout]
    changes: list[Change]
    warnings: list[str]


def make_plan(
    config: Config,
    ranks: int,
    gpu: Gpu,
    *,
    mfu: float | None = None,
    tokens_per_second: float | None = None,
    bandwidth: float = 1e9,
) -> Plan:
    """Plan `config` on `ranks` GPUs. `tokens_per_second` is of one GPU, `bandwidth` bytes a second of the whole job.

    Raises ConfigError where training would refuse so many ranks.
    """
    found = memory(config, ranks)
    fits = found.total <= gpu.usable
    parameters = parameter_count(config.model)
    pace = _pace(config, ranks, gpu, mfu, tokens_per_second)
    disk = _disk(config, parameters, bandwidth)
    return Plan(
        gpu=gpu,
        ranks=ranks,
        parameters=parameters,
        memory=found,
        fits=fits,
        largest_micro=largest_micro(config, ranks, gpu),
        accumulation=config.batch.accumulation(ranks),
        tokens_per_update=config.batch.tokens,
        flops_per_token=flops_per_token(config.model, config.batch.seq_len),
        updates=config.last_update,
        pace=pace,
        expected=expected(config, ranks, gpu),
        recommended=recommended(config, ranks, gpu),
        unexpected=unknown(config, gpu),
        disk=disk,
        layouts=layouts(config, ranks, gpu),
        changes=[] if fits else changes(config, ranks, gpu),
        warnings=_warnings(config, ranks, found, gpu, pace, disk),
    )


def misfit(config: Config, ranks: int, device_bytes: int) -> str | None:
    """One line where `config` cannot fit a device of so many bytes, else None."""
    gpu = Gpu("this GPU", device_bytes, None)
    total = memory(config, ranks).total
    if total <= gpu.usable:
        return None
    cheapest = next(iter(changes(config, ranks, gpu)), None)
    words = f"; {describe(cheapest)}" if cheapest else ""
    return (
        f"WARNING this run needs about {total / GIB:.1f} GiB on a GPU, and the one here holds "
        f"{device_bytes / GIB:.1f} GiB{words} (llmtrain plan says more)"
    )


def describe(change: Change) -> str:
    """A change as the words and flags that make it."""
    flags = "".join(f" --set {override}" for override in change.overrides)
    return f"it fits with {change.words}:{flags}" if flags else f"it fits on {change.words}"


def _pace(config: Config, ranks: int, gpu: Gpu, mfu: float | None, tokens_per_second: float | None) -> Pace | None:
    flops = flops_per_token(config.model, config.batch.seq_len)
    peak = gpu.flops(config.engine.precision)
    if tokens_per_second is not None:
        source, rate = "measured tokens per second", tokens_per_second
    elif peak is None:
        return None
    else:
        source = "MFU as given" if mfu is not None else f"MFU of {ASSUMED_MFU:.0%} assumed, not measured"
        rate = (ASSUMED_MFU if mfu is None else mfu) * peak / flops
    together = rate * ranks
    step = config.batch.tokens / together
    reached = None if peak is None else rate * flops / peak
    return Pace(source, reached, together, step, step * config.last_update / 86400)


def _disk(config: Config, parameters: int, bandwidth: float) -> Disk:
    """At the end of the run there are the newest `keep`, multiples of `keep_every`, and the newest two of any kind."""
    one = checkpoint_bytes(config, parameters)
    last, checkpoint = config.last_update, config.checkpoint
    every = None if checkpoint.every is None else config.updates(checkpoint.every)
    permanent = {last, *(range(every, last + 1, every) if every else ())}
    ephemeral = None if checkpoint.ephemeral is None else config.updates(checkpoint.ephemeral)
    newest = sorted({*permanent, *(range(ephemeral, last + 1, ephemeral) if ephemeral else ())})[-2:]
    kept = {*sorted(permanent)[-checkpoint.keep :], *newest}
    if checkpoint.keep_every is not None:
        multiple = config.updates(checkpoint.keep_every)
        kept |= {step for step in permanent if step % multiple == 0}
    return Disk(one, every, len(kept), (len(kept) + 1) * one, one / bandwidth)


def _warnings(config: Config, ranks: int, found: Memory, gpu: Gpu, pace: Pace | None, disk: Disk) -> list[str]:
    said = []
    if gpu.usable * TIGHT < found.total <= gpu.usable:
        said.append(f"tight: {found.total / gpu.usable:.0%} of what tensors may take, and this is an estimate")
    if config.engine.deepspeed:
        said.append("of engine.deepspeed only bucket sizes, thresholds and overlap_comm are counted")
    if pace is not None and recomputed_blocks(config):
        said.append("recomputed blocks cost up to a third more time than the same MFU without them")
    if words := fp8_words(config, ranks, gpu):
        said.append(words)
    if pace is not None and disk.every is not None and disk.seconds > disk.every * pace.step_seconds:
        said.append(
            f"a save takes {disk.seconds:.0f} s and the next is due after {disk.every * pace.step_seconds:.0f} s: "
            "raise checkpoint.every"
        )
    return said
