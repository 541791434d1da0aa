"""Is a run that is interrupted and resumed the same run, on this machine, with this config?

Three legs train the user's own config, on its own schedule, in a folder of their own: one straight through updates 1
to N, one that ends after update K, and one that goes on from that one's checkpoint in new processes, on the same layout
(an engine on a number of ranks) or on another. They are compared in the order of time, so the component that is named
first is where the difference began: the first K updates, which show whether the machine computes the same twice at all;
the state as it was loaded; each update after it; the state at the end. Where it does not compute the same twice, a
probe looks for the module whose kernel gives other bits (`llmtrain.train.verify_probe`).
"""

import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmtrain.checkpoint.files import require_empty
from llmtrain.config import Config
from llmtrain.config_file import to_yaml, validate
from llmtrain.data.dataset import open_data
from llmtrain.distributed import find_place
from llmtrain.errors import ConfigError, EnvironmentError
from llmtrain.model.size import parameter_count
from llmtrain.train.verify_findings import BOUNDS, Finding, compare_states, compare_updates
from llmtrain.train.verify_probe import PROCESSES, Probed, first_difference
from llmtrain.units import show_bytes

ENGINES = ("single", "fsdp", "zero0", "zero1", "zero2", "zero3")
STATES = 11  # of 12 bytes a parameter, in the checkpoints and records of all legs
GRACE_S = 10.0  # for the other ranks of a leg, once one has failed
COMPUTED = ("loss", "gradient norm", "weights", "moments")  # components that a kernel can change


class Layout(NamedTuple):
    """An engine, one of ENGINES, on a number of ranks."""

    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine} x {self.ranks}"

    @classmethod
    def of(cls, config: Config, engine: str | None, ranks: int | None) -> "Layout":
        """What was asked for, or what the config says: on one rank for `single`, else on every GPU, or on 2 of a CPU.

        Raises ConfigError where there is no such engine.
        """
        engine = engine or config.engine.kind
        if engine == "deepspeed":
            engine = f"zero{config.engine.zero_stage}"
        if engine not in ENGINES:
            raise ConfigError(f"engine {engine}: choose one of {', '.join(ENGINES)}, or deepspeed")
        if ranks is None:
            ranks = 1 if engine == "single" else torch.cuda.device_count() if torch.cuda.is_available() else 2
        return cls(engine, ranks)


class Verification(NamedTuple):
    """What was compared, in the order of time, and what came of it.

    `deterministic` is what the legs ran with, and `configured` what the config says.
    """

    straight: Layout
    resumed: Layout
    at: int
    steps: int
    findings: list[Finding]
    twice: bool  # the first K updates were the same when they were made again
    deterministic: bool
    configured: bool
    probed: Probed | None = None  # where they were not, and a kernel may be why

    @property
    def differs(self) -> Finding | None:
        """The first component that is not as it must be."""
        wrong = [finding for finding in self.findings if not finding.ok]
        return min(wrong, key=lambda finding: finding.update or 0, default=None)

    @property
    def verdict(self) -> str:
        """One line for a person."""
        wrong = self.differs
        if wrong is not None:
            why = "" if self.twice else "not deterministic even without a resume: "
            module = "" if self.probed is None else f"; {self.probed.said}"
            return f"DIFFERS: {why}{wrong.component} at update {wrong.update}: {wrong.first}{module}"
        where = f"{self.straight}, resumed after update {self.at}"
        if self.straight == self.resumed:
            return f"VERIFIED {where}: updates {self.at + 1} to {self.steps} are the same, bit for bit"
        loss = next(finding for finding in self.findings if finding.component == "loss")
        return (
            f"VERIFIED {where} on {self.resumed}: the same state, rates and samples bit for bit, "
            f"losses within {loss.bound:g} (largest difference {loss.largest:.1e})"
        )

    @property
    def note(self) -> str:
        """What the legs' kernels mean for the run. Empty on a CPU, where each kernel gives the same bits every time."""
        if not torch.cuda.is_available() or (self.configured and self.deterministic):
            return ""
        if self.deterministic:
            return (
                "the legs ran with engine.deterministic: true, and the config does not say so: "
                "write it there, or the run itself will not resume exactly on a GPU"
            )
        return (
            "the legs ran with engine.deterministic: false, as configured: "
            "some kernels of a GPU then sum in another order each time"
        )

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "verified": self.differs is None,
            "verdict": self.verdict,
            "straight": self.straight._asdict(),
            "resumed": self.resumed._asdict(),
            "at": self.at,
            "steps": self.steps,
            "deterministic": self.deterministic,
            "note": self.note,
            "probe": None if self.probed is None else self.probed._asdict(),
            "findings": [
                {**finding._asdict(), "largest": finding.largest if math.isfinite(finding.largest) else None}
                for finding in self.findings
            ],
        }


class Leg(NamedTuple):
    """One leg, ready to start: this many ranks of `module`, whose `main` gets these words."""

    name: str
    words: list[str]
    ranks: int
    out: Path
    timeout_s: float  # in which some rank must get on
    module: str = "llmtrain.train.verify_leg"


def verify(
    config: Config,
    folder: Path,
    *,
    prepare_command: str,
    straight: Layout,
    resumed: Layout,
    at: int,
    steps: int,
    say: Callable[[str], None],
    launch: "Callable[[Leg], None] | None" = None,
    as_configured: bool = False,
) -> Verification:
    """Train the legs in `folder` and compare them; `launch` runs one to its end (processes here, where it is None).

    The legs run with `engine.deterministic: true`, or, `as_configured`, with what the config says.
    Raises LlmtrainError where they cannot be trained: no data, no room, another number of ranks than the batch takes.
    """
    _check(config, folder, prepare_command, (straight, resumed), at, steps)
    launch = launch or run_processes
    configured = config.engine.deterministic
    deterministic = configured or not as_configured
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"deterministic": deterministic})})
    exact: dict[str, float] = {}
    rounding = config.engine.precision if config.optim.name == "adamw" else "bf16"  # Newton-Schulz, and 8-bit moments
    bounds = exact if straight == resumed else BOUNDS[rounding]
    a = _leg(config, folder, "straight", straight, at, 0, steps)
    b = _leg(config, folder, "interrupted", straight, at, 0, at)
    c = _leg(config, folder, "resumed", resumed, at, at, steps)

    def train(leg: Leg, layout: Layout, first: int, last: int) -> None:
        say(f"{leg.name}: updates {first} to {last} on {layout}")
        launch(leg)

    train(a, straight, 1, steps)
    train(b, straight, 1, at)
    findings = compare_updates(b.out, a.out, range(1, at + 1), exact)
    findings += compare_states(b.out, a.out, at, "when trained again", exact)
    if not all(finding.ok for finding in findings):
        found = Verification(straight, resumed, at, steps, findings, False, deterministic, configured)
        assert found.differs is not None
        if found.differs.component.startswith(COMPUTED):
            found = found._replace(probed=_probe(config, folder, straight, say, launch))
        return found
    train(c, resumed, at + 1, steps)
    findings = compare_states(c.out, a.out, at, "as loaded", exact)
    findings += compare_updates(c.out, a.out, range(at + 1, steps + 1), bounds)
    findings += compare_states(c.out, a.out, steps, "at the end", bounds, since=at)
    return Verification(straight, resumed, at, steps, findings, True, deterministic, configured)


def _probe(
    config: Config, folder: Path, layout: Layout, say: Callable[[str], None], launch: Callable[[Leg], None]
) -> Probed:
    """Look for the module whose kernel gives other bits each time, on one rank."""
    folders = []
    for number in range(1, PROCESSES + 1):
        leg = _leg(config, folder, f"probe_{number}", layout, 1, 0, 1)
        leg = leg._replace(words=leg.words[:2], ranks=1, module="llmtrain.train.verify_probe")
        say(f"{leg.name}: forward and backward passes of the first micro-batch")
        try:
            launch(leg)
        except EnvironmentError as error:
            return Probed(None, None, f"which module, could not be found out: {str(error).splitlines()[-1]}")
        folders.append(leg.out)
    return first_difference(folders, alone=layout.ranks == 1, compiled=config.engine.compile)


def run_processes(leg: Leg) -> None:
    """Run a leg's ranks as processes on this machine. Raises EnvironmentError with what they said where one fails."""
    environment = {**os.environ, "WORLD_SIZE": str(leg.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    environment |= {"LOCAL_WORLD_SIZE": str(leg.ranks), "LOCAL_SIZE": str(leg.ranks)}
    logs = [leg.out / f"rank_{rank:05d}.log" for rank in range(leg.ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", leg.module, *leg.words]
                processes.append(subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT))
        stalled = _watch(processes, leg)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        if stalled or process.returncode > 0:
            why = f"no rank got on for {leg.timeout_s:g} s" if stalled else f"exit code {process.returncode}"
            said = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise EnvironmentError(f"the {leg.name} leg failed: {why}; {log.name} ends with\n{said}")
    if any(process.returncode for process in processes):
        codes = [process.returncode for process in processes]
        raise EnvironmentError(f"the {leg.name} leg was killed: exit codes {codes}; see {leg.out}")


def _watch(processes: Sequence["subprocess.Popen[bytes]"], leg: Leg) -> bool:
    """Wait until all ranks have ended, or one has failed and the others had time to. Whether they stalled instead."""
    written, moved = -1, time.monotonic()
    failed: float | None = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        size = sum(path.stat().st_size for path in leg.out.rglob("*") if path.is_file())
        if size != written:
            written, moved = size, now
        if any(process.poll() for process in processes):
            failed = failed or now
        if failed is not None and now > failed + GRACE_S:
            return False
        if now > moved + leg.timeout_s:
            return True
        time.sleep(0.05)
    return False


def _check(config: Config, folder: Path, prepare_command: str, layouts: Sequence[Layout], at: int, steps: int) -> None:
    """Everything that can be told before the first process is started."""
    if find_place(os.environ).size > 1:
        raise EnvironmentError("verify-resume starts its own ranks: run it by itself, not under a launcher")
    if not 1 <= at < steps:
        raise ConfigError(f"--at {at} --steps {steps}: the interruption comes after update 1 and before the last one")
    for layout in layouts:
        if layout.engine == "single" and layout.ranks != 1:
            raise ConfigError(f"engine single runs on one rank, not on {layout.ranks}")
        config.batch.accumulation(layout.ranks)
    open_data(config.data.path, prepare_command)
    require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    free, wanted = shutil.disk_usage(folder).free, STATES * 12 * parameter_count(config.model)
    if free < wanted:
        raise EnvironmentError(
            f"{folder} has {show_bytes(free)} free, the legs take {show_bytes(wanted)}: "
            "name a folder on a larger disk with --keep"
        )


def _leg(config: Config, folder: Path, name: str, layout: Layout, at: int, first: int, last: int) -> Leg:
    """Write a leg's config. The interrupted and the resumed one are two legs of one run."""
    run_dir = folder / ("run_straight" if name == "straight" else "run_interrupted")
    out = folder / name
    out.mkdir()
    path = out / "config.yaml"
    path.write_text(to_yaml(_leg_config(config, layout, run_dir, at, last)))
    around = ",".join(str(update) for update in sorted({at, last}))
    words = [str(path), str(out), "must" if first else "never", around]
    return Leg(name, words, layout.ranks, out, config.engine.timeout_s)


def _leg_config(config: Config, layout: Layout, run_dir: Path, at: int, last: int) -> Config:
    """The user's config, but for where it runs, when it ends, and what is not needed: wandb, more than a look at the
    validation set."""
    values = config.model_dump(mode="json")
    stage = int(layout.engine[-1]) if layout.engine.startswith("zero") else config.engine.zero_stage
    kind = "deepspeed" if layout.engine.startswith("zero") else layout.engine
    values["run"] |= {"dir": str(run_dir), "stop_at": f"{last} steps", "max_minutes": None, "branch_from": None}
    values["engine"] |= {"kind": kind, "zero_stage": stage}
    values["validation"] |= {"every": None, "max_tokens": config.batch.seq_len, "sets": {}}
    values["checkpoint"] |= {"dir": "", "every": f"{at} steps", "ephemeral": None, "keep": 2, "keep_every": None}
    values["logging"]["wandb"]["mode"] = "disabled"
    return validate(values, "verify-resume")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
