"""One leg of a run, from a config to its end: check, build, start or resume, train, say how it ended."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

import llmtrain
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import Config, content_hash
from llmtrain.config_file import to_yaml
from llmtrain.data.batches import ValidationSet
from llmtrain.data.dataset import PreparedData, open_unchecked
from llmtrain.descriptors import raise_limit
from llmtrain.distributed import World, find_place, node_name, open_world, set_timeouts
from llmtrain.engines import numerics
from llmtrain.engines.base import Engine
from llmtrain.model.size import flops_per_token, parameter_count
from llmtrain.planner.plan import misfit
from llmtrain.schedules import Schedule, plan
from llmtrain.train import average, rng
from llmtrain.train.attempts import note
from llmtrain.train.feed import check_data, check_together, train_batches, validation_sets
from llmtrain.train.join import ScheduleChange, Segments, clock, last_update
from llmtrain.train.lock import RunLock, hold_run
from llmtrain.train.loop import Trainer
from llmtrain.train.metrics import MetricsLog
from llmtrain.train.preflight import measure, require_alike
from llmtrain.train.progress import TrainingProgress
from llmtrain.train.start import Start, begin
from llmtrain.train.stop import StopRequest
from llmtrain.train.throughput import peak_flops
from llmtrain.train.wandb_mirror import WandbMirror
from llmtrain.train.watchdog import Watchdog, group_timeout_s, leave_failures_to_watchdog
from llmtrain.trajectory import trajectory_of


def train(
    config: Config,
    *,
    prepare_command: str,
    resume: str = "auto",
    change: ScheduleChange | None = None,
    build: Callable[[Config, World], Engine] = average.build,
    stop: StopRequest | None = None,
) -> None:
    """Train `config` to its last update, or until told to stop. Everything a user can get wrong is checked first.

    `prepare_command` is what to run when the data is missing. With `change` a checkpoint may be gone on from on another
    schedule than it was trained on. `build` makes the engine. `stop` may have been told already. Raises LlmtrainError.
    """
    raise_limit()
    leg = _checked(
        config, prepare_command, resume, change, stop or StopRequest(Path(config.run.dir), config.run.max_minutes)
    )
    leave_failures_to_watchdog()
    with open_world(
        group_timeout_s(config),
        collectives=config.engine.kind != "single",
        meet_timeout_s=config.engine.meet_timeout_s,
        folder=Path(config.run.dir),
    ) as world:
        _tell(world, require_alike(config, leg.data, leg.held_out, world))
        token_files = check_together(leg.data, world)
        with (
            hold_run(Path(config.run.dir), world) as lock,
            ExitStack() as reported,
            Watchdog(config, world) as watchdog,
        ):
            _tell(world, measure(world))
            _tell(world, _too_large(config, world))
            watchdog.at("start")
            engine = build(config, world)
            set_timeouts(group_timeout_s(config))
            watchdog.follow(engine, {"train_step": "update", "nats": "validate"})
            with numerics.named():
                _run(leg, engine, lock, reported, watchdog, token_files)
            watchdog.at("end")
            world.barrier()


class Leg(NamedTuple):
    """What a leg was asked to do and with what, checked before any rank is waited for."""

    config: Config
    schedule: Schedule
    data: PreparedData
    held_out: list[ValidationSet]
    stop: StopRequest
    resume: str
    change: ScheduleChange | None


def _checked(
    config: Config, prepare_command: str, resume: str, change: ScheduleChange | None, stop: StopRequest
) -> Leg:
    schedule = plan(config.schedule, tokens_per_update=config.batch.tokens, beta2=config.optim.betas[1])
    decay_multiplier(config, [[0, 0, config.batch.sequences]])
    data = open_unchecked(config.data.path, prepare_command)
    held_out = validation_sets(config, data)
    check_data(config, data)
    config.batch.accumulation(find_place(os.environ).size)
    return Leg(config, schedule, data, held_out, stop, resume, change)


def _run(leg: Leg, engine: Engine, lock: RunLock, reported: ExitStack, watchdog: Watchdog, token_files: int) -> None:
    """Start or resume, train, and note how it ended. `token_files` is how many this rank has looked at."""
    config, stop, world = leg.config, leg.stop, engine.world
    store = _store(config, world)
    rng.seed_generators(config.run.seed, world.rank)
    start = begin(engine, store, config, leg.data.manifest.content_hash, leg.schedule, leg.resume, leg.change)
    store.require_room(engine.state())
    last = last_update(config, start.schedule, start.since)
    log, mirror, attempt, lost = _open_records(config, world, start, token_files)
    progress = TrainingProgress(
        shown=world.first, first_update=start.update, last_update=last, every=config.logging.every
    )
    saver = Saver(store, engine.state(), progress.say, background=config.checkpoint.async_save)
    watchdog.update = start.update
    watchdog.follow(saver, {"save": "save", "finish": "save"})
    peak = peak_flops(world.device, config.engine.precision)
    trainer = Trainer(
        config=config,
        engine=engine,
        schedule=start.schedule,
        decay=decay_multiplier(config, start.segments),
        batches=train_batches(config, world, leg.data, start.since),
        held_out=leg.held_out,
        saver=saver,
        lock=lock,
        stop=stop,
        progress=progress,
        log=log,
        mirror=mirror.log if mirror else lambda row: None,
        facts={**describe_run(config, world, start, leg.data), "wandb_id": mirror.run_id if mirror else ""},
        attempt=attempt,
        flops_per_token=flops_per_token(config.model, config.batch.seq_len),
        peak_flops=None if peak is None else peak * world.size,
    )
    # When a rank is lost the launcher sends SIGTERM to the others: it must not cut the watchdog's report short.
    reported.enter_context(stop.listening())
    with progress, saver, closing(mirror) if mirror else nullcontext():
        progress.say(banner(config, start, last, engine.describe(), lost))
        _restore_generators(world, start)
        reason = ""
        if start.update < last:
            reason = trainer.train(start.update + 1, last, validate_first=start.how != "resumed")
        elif world.any(log is not None and not log.validated(last)):
            trainer.validate(last)
        if world.first:
            stop.clear()
    _note_end(stop, world, Path(config.run.dir), attempt, reason, engine.state().update)
    how = f"STOPPED ({reason}): the same command goes on from here" if reason else f"FINISHED run={config.run.name}"
    progress.say(f"{how}  {Path(config.run.dir)}")


def _note_end(stop: StopRequest, world: World, run_dir: Path, attempt: int, reason: str, update: int) -> None:
    """What is written of an attempt that ended by itself: why, where, and how long a stop and its save took."""
    if world.first:
        save_s = None if stop.asked_at is None else round(time.monotonic() - stop.asked_at, 3)
        outcome = {"attempt": attempt, "outcome": "stopped" if reason else "finished", "reason": reason}
        note(run_dir, "ended", **outcome, update=update, slowest_s=round(stop.slowest_s, 3), save_s=save_s)


def _tell(world: World, lines: list[str]) -> None:
    """Print what the pre-flight found, on the first rank."""
    if world.first:
        for line in lines:
            print(f"pre-flight: {line}", flush=True)


def _too_large(config: Config, world: World) -> list[str]:
    """A warning where a GPU cannot hold the run, as `llmtrain plan` counts it."""
    if world.device.type != "cuda":
        return []
    said = misfit(config, world.size, torch.cuda.get_device_properties(world.device).total_memory)
    return [] if said is None else [said]


def decay_multiplier(config: Config, segments: Segments) -> Callable[[int], float]:
    """The multiplier of the weight decay of update k: 1 where it has no schedule. Raises ScheduleError."""
    written = config.optim.weight_decay_schedule
    if written is None:
        return lambda k: 1.0
    in_tokens = clock(segments, config.batch.seq_len)
    return plan(written, in_tokens[0][2], config.optim.betas[1]).over(in_tokens)


def describe_run(config: Config, world: World, start: Start, data: PreparedData) -> dict[str, Any]:
    """What checkpoints and validation rows say about the run they come from."""
    trajectory = {**trajectory_of(config, data.manifest.content_hash), "batch_segments": start.segments}
    schedule = start.schedule
    return {
        "trajectory": trajectory,
        "trajectory_hash": content_hash(trajectory),
        "lineage": start.lineage,
        "schedule": schedule.spec,
        "schedule_hash": schedule.hash,
        "engine": {
            "kind": config.engine.kind,
            "zero_stage": config.engine.zero_stage,
            "ranks": world.size,
            "deterministic": config.engine.deterministic,
        },
        "versions": {"llmtrain": llmtrain.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "git_commit": _git_commit(),
        "compare": {
            "schedule": schedule.name,
            "schedule_hash": schedule.hash,
            "data_hash": data.manifest.content_hash,
            "tokenizer_hash": data.manifest.tokenizer_hash,
            "model_hash": content_hash(trajectory["model"]),
            "initial_weights": trajectory.get("init_from", "random"),
        },
    }


def banner(config: Config, start: Start, last: int, engine: str, lost: str = "") -> str:
    """What is printed before the first update: the whole resolved config, the engine, and where the run starts."""
    lines = [to_yaml(config).rstrip(), ""]
    lines += [
        *start.said,
        *([lost] if lost else []),
        *average.left_behind(config, start.found),
        *_other_kernels(config, start),
        engine,
        f"{parameter_count(config.model):,} parameters, {config.batch.sequences} sequences or "
        f"{config.batch.tokens:,} tokens an update, {last} updates, schedule {start.schedule.hash}",
    ]
    if start.found is None:
        lines.append(f"FRESH START run={config.run.name}")
    else:
        tokens = start.since.samples * config.batch.seq_len
        lines.append(
            f"{start.how.upper()} run={config.run.name} step={start.update} tokens={tokens} "
            f"lr={start.schedule.lr(start.update):.6e} from={start.found.path}"
        )
    return "\n".join(lines)


def _other_kernels(config: Config, start: Start) -> list[str]:
    """A line where the run goes on with kernels of another kind: the same run, but for its last bits."""
    if start.found is None:
        return []
    before, now = start.found.state.get("engine", {}).get("deterministic", False), config.engine.deterministic
    return [] if before == now else [f"engine.deterministic was {before} until here and is {now} from here on"]


def _store(config: Config, world: World) -> CheckpointStore:
    """The run's checkpoints. Its messages have connections of their own: saves are written by a thread."""
    every = config.checkpoint.keep_every
    return CheckpointStore(
        config.checkpoint_url,
        world.apart(config.checkpoint.timeout_s),
        config.checkpoint.keep,
        keep_every=None if every is None else config.updates(every),
        staging=Path(config.run.dir) / "staging",
    )


def _restore_generators(world: World, start: Start) -> None:
    """The generators of this rank as they were saved; ranks that there were not then have fresh ones."""
    if start.found is not None:
        text = start.found.reader.metadata(world.rank).get(rng.METADATA_KEY)
        if text is not None:
            rng.restore(text, world.device)


def _open_records(
    config: Config, world: World, start: Start, token_files: int
) -> tuple[MetricsLog | None, WandbMirror | None, int, str]:
    """The first rank's metrics log, rewound to the start, its mirror, the number of this attempt, and a warning.

    Notes that the attempt has started.
    """
    hosts = sorted(set(world.gather_text(node_name())))
    if not world.first:
        return None, None, 1, ""
    run_dir = Path(config.run.dir)
    log = MetricsLog(run_dir)
    attempt = log.next_attempt()
    lost = ""
    if start.how == "resumed" and start.found is not None and log.lost(start.found.state["metrics_offset"]):
        lost = f"{log.path} is shorter than when update {start.update} was saved: rows are missing from its history"
    log.rewind(start.update if start.how == "resumed" else -1)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    mirror = WandbMirror(config, run_dir)
    looked = {"token_files": token_files, "index_files": 0, "index_bytes": 0}
    if start.found is not None:
        reader = start.found.reader
        reader.metadata(world.rank)  # asked for in any case, and so counted
        looked |= {"index_files": reader.opened, "index_bytes": reader.header_bytes}
    note(run_dir, "started", attempt=attempt, update=start.update, ranks=world.size, hosts=hosts, **looked)
    return log, mirror, attempt, lost


def _git_commit() -> str | None:
    """The commit of the code that runs, where it lies in a git checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(llmtrain.__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
