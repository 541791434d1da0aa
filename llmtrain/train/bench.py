"""How fast does a config train here, where does an update's time go, and how near is that to the device's best?

The engine, the batches and the logging are those of training, fed from the run's data, or from random tokens where it
is not prepared. Weights are drawn on the device, other ones than a run starts from. Untimed updates come first: they
allocate and compile. Then updates are timed as training makes them, and a few more with every phase waited for, which
is slower on a GPU: phases are shares of an update, not parts of it.

Tokens per second are those of the median update. Model FLOP utilisation (MFU) counts 6 N + 12 L H Q T for each token
(`llmtrain.model.size`) over the device's peak: by its exact name on a GPU, none where that is unknown, and on a CPU as
measured here by one large matrix product. Hardware utilisation (HFU) adds what activation checkpointing computes again.
"""

import os
import platform
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

import llmtrain
from llmtrain.config import Config
from llmtrain.data.batches import Batch, TrainBatches
from llmtrain.data.dataset import open_data
from llmtrain.distributed import World, find_place, open_world
from llmtrain.engines import build_engine, numerics
from llmtrain.engines.base import WEIGHT, Engine, StepStats
from llmtrain.errors import DataError
from llmtrain.model.precision import linear
from llmtrain.model.size import flops_per_token, forward_flops_per_token, parameter_count
from llmtrain.planner.memory import memory
from llmtrain.train.feed import check_data, train_batches
from llmtrain.train.late import Late
from llmtrain.train.links import collectives, communication_s
from llmtrain.train.metrics import MetricsLog
from llmtrain.train.throughput import memory_gib, peak_flops

WARM_UP = 3
PHASED = 3
FORMULA = "6 N + 12 L H Q T"
LOGGING = "log"


class Stopwatch:
    """Seconds in each phase of an update, each waited for on its device."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.running = False
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block to `name`, while the watch is running."""
        if not self.running:
            yield
            return
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class RandomValues:
    """State drawn on the device, in seconds for any size: an update costs the same whatever it starts from."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.std = config.model.init_std
        self.generator = torch.Generator(device).manual_seed(config.run.seed)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32 on the device."""
        device = self.generator.device
        if kind != WEIGHT:
            return torch.zeros(stop - start, device=device)
        if name.endswith("norm.weight"):
            return torch.ones(stop - start, device=device)
        return torch.randn(stop - start, generator=self.generator, device=device).mul_(self.std)


def bench(
    config: Config, *, steps: int, warm_up: int = WARM_UP, phases: bool = True, trace: Path | None = None
) -> dict[str, Any] | None:
    """Time `steps` updates of a config, after `warm_up` (at least 1) that are not timed. Collective.

    Returns the result on the first rank, None on the others; without `phases` it has none, and takes less time.
    `trace` is where the first rank writes a Chrome trace of two updates. Nothing else is written. Raises LlmtrainError.
    """
    started = time.perf_counter()
    config.batch.accumulation(find_place(os.environ).size)
    with open_world(config.engine.timeout_s, collectives=config.engine.kind != "single") as world:
        watch = Stopwatch(world.device)
        engine = build_engine(config, world, watch.phase)
        engine.load(RandomValues(config, world.device), 0)
        source, fed, updates = _feed(config, world)
        with closing(updates), tempfile.TemporaryDirectory() as folder:
            log = MetricsLog(Path(folder))
            with numerics.named():
                _updates(engine, updates, 1, log)
            first_s = time.perf_counter() - started
            _updates(engine, updates, warm_up - 1, log)
            _forget_peak(world.device)
            seconds, waited = _updates(engine, updates, steps, log)
            peak_gib, reserved_gib = memory_gib(world.device), _reserved_gib(world.device)
            shares = _phases(engine, updates, watch, log) if phases else {}
            communication = communication_s(world, lambda: _updates(engine, updates, 1, log)) if phases else {}
            if trace is not None:
                _trace(engine, updates, log, trace if world.first else None)
        result = {
            **_about(config, world),
            "data": source,
            "launch_to_first_update_s": round(first_s, 3),
            "updates": steps,
            **_speed(config, world, seconds),
            "phases_s": {"data": round(median(waited), 6), **shares},
            "communication_s": communication,
            "batches_tokens_per_s": fed,
            "memory_gib": round(peak_gib, 3),
            "reserved_gib": round(reserved_gib, 3),
            "planned_gib": round(_planned(config, world) / 2**30, 3),
            "collectives": collectives(world),
        }
        world.barrier()
    return result if world.first else None


def _feed(config: Config, world: World) -> tuple[str, int | None, Generator[list[Batch], None, None]]:
    """What is trained on, how fast it is read alone (tokens/s of this rank), and the micro-batches of every update."""
    try:
        data = open_data(config.data.path)
    except DataError:
        return "random tokens", None, _random(config, world)
    check_data(config, data)
    batches = train_batches(config, world, data)
    return str(data.path), _reading(config, batches, world), batches.iterate(1, 10**9)


def _reading(config: Config, batches: TrainBatches, world: World) -> int:
    """Tokens a second that this rank reads, orders and batches, with nothing else to do."""
    batches.update(1)
    begin = time.perf_counter()
    made = 0
    while time.perf_counter() - begin < 0.2:
        made += 1
        batches.update(made)
    return round(made * config.batch.tokens / world.size / (time.perf_counter() - begin))


def _random(config: Config, world: World) -> Generator[list[Batch], None, None]:
    generator = torch.Generator().manual_seed(config.run.seed + world.rank)
    shape = (config.batch.micro, config.batch.seq_len + 1)
    while True:
        tokens = torch.randint(
            config.model.vocab_size, (config.batch.accumulation(world.size), *shape), generator=generator
        )
        yield [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), all_valid=True) for t in tokens]


def _updates(
    engine: Engine, updates: Iterator[list[Batch]], count: int, log: MetricsLog
) -> tuple[list[float], list[float]]:
    """Make `count` updates as training does. Returns the seconds of each, and those its batch was waited for."""
    taken: list[float] = []
    waited: list[float] = []

    def record(k: int, stats: StepStats, seconds: float) -> None:
        log.append({"kind": "step", "step": k, "loss": stats.loss.item(), "grad_norm": stats.grad_norm.item()})
        taken.append(seconds)

    late = Late(engine.world.device, record)
    for k in range(1, count + 1):
        late.start()
        begin = time.perf_counter()
        micro_batches = next(updates)
        waited.append(time.perf_counter() - begin)
        late.made(k, engine.train_step(micro_batches, 1.0))
    late.flush()
    return taken, waited


def _phases(engine: Engine, updates: Iterator[list[Batch]], watch: Stopwatch, log: MetricsLog) -> dict[str, float]:
    """Seconds of an update by phase, each waited for. What lies between the phases is `other`."""
    watch.running = True
    for k in range(1, PHASED + 1):
        micro_batches = next(updates)
        with watch.phase("update"):
            stats = engine.train_step(micro_batches, 1.0)
        with watch.phase(LOGGING):
            log.append({"kind": "step", "step": k, "loss": stats.loss.item(), "grad_norm": stats.grad_norm.item()})
    watch.running = False
    seconds = {name: total / PHASED for name, total in watch.seconds.items()}
    within = sum(value for name, value in seconds.items() if name not in ("update", LOGGING))
    seconds["other"] = max(0.0, seconds.pop("update") - within)
    return {name: round(value, 6) for name, value in seconds.items()}


def _speed(config: Config, world: World, seconds: list[float]) -> dict[str, Any]:
    """Rates of the median update, and what they are of the devices' best."""
    typical = median(seconds)
    rate = config.batch.tokens / typical / world.size
    per_token = flops_per_token(config.model, config.batch.seq_len)
    again = recomputed_share(config)
    forward = forward_flops_per_token(config.model, config.batch.seq_len)
    peak, source = _peak(config, world.device)
    quarter = quantiles(seconds, n=4) if len(seconds) > 1 else [typical] * 3
    return {
        "step_s": round(typical, 6),
        "step_s_quartiles": [round(quarter[0], 6), round(quarter[2], 6)],
        "tokens_per_s": round(rate * world.size, 1),
        "tokens_per_s_per_device": round(rate, 1),
        "flops_per_token": per_token,
        "formula": FORMULA,
        "tflops_per_device": round(rate * per_token / 1e12, 4),
        "peak_tflops": None if peak is None else round(peak / 1e12, 4),
        "peak_source": source,
        "mfu": None if peak is None else round(rate * per_token / peak, 4),
        "hfu": None if peak is None or again is None else round(rate * (per_token + again * forward) / peak, 4),
    }


def recomputed_share(config: Config) -> float | None:
    """Share of the blocks whose forward pass is computed twice; None where the compiler chooses what is."""
    if config.engine.activation_memory < 1:
        return None
    choice = config.engine.activation_checkpointing
    if isinstance(choice, str):
        return 1.0 if choice == "all" else 0.0
    return len(range(0, config.model.num_layers, choice)) / config.model.num_layers


def _peak(config: Config, device: torch.device) -> tuple[float | None, str]:
    """FLOP/s at best, and where that is from."""
    if device.type == "cpu":
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        return matrix_product_flops(dtype), f"measured here: a {dtype} product of 1024 x 1024 matrices"
    name = torch.cuda.get_device_name(device)
    known = peak_flops(device, config.engine.precision)
    if known is None:
        return None, f'no peak is known for "{name}" in {config.engine.precision}'
    return known, f"data sheet of {name}, dense bf16"


def matrix_product_flops(dtype: torch.dtype, size: int = 1024, repetitions: int = 8) -> float:
    """FLOP/s of the fastest of some products of two square matrices on the CPU, computed as the model computes them."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    taken = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        linear(a, b)
        taken.append(time.perf_counter() - begin)
    return 2 * size**3 / min(taken)


def _planned(config: Config, world: World) -> int:
    return memory(config, world.size, "cuda" if world.device.type == "cuda" else "cpu").total


def _trace(engine: Engine, updates: Iterator[list[Batch]], log: MetricsLog, path: Path | None) -> None:
    """A Chrome trace of two updates, written to `path` where there is one."""
    with torch.profiler.profile() as profiler:
        _updates(engine, updates, 2, log)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _reserved_gib(device: torch.device) -> float:
    """What the allocator took from a GPU at most, for tensors and the gaps between them."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


def _about(config: Config, world: World) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "engine": {"kind": config.engine.kind, "zero_stage": config.engine.zero_stage},
        "precision": config.engine.precision,
        "compile": config.engine.compile,
        "deterministic": config.engine.deterministic,
        "activation_checkpointing": config.engine.activation_checkpointing,
        "fp8": config.engine.fp8,
        "micro": config.batch.micro,
        "numerics": numerics.described(config, world.device),
        "parameters": parameter_count(config.model),
        "tokens_per_update": config.batch.tokens,
        "versions": {"llmtrain": llmtrain.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
