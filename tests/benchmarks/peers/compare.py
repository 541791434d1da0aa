"""How fast does llmtrain train beside what a user would take instead, on the same work, in one run?

    python -m tests.benchmarks.peers.compare --sweeps 5 --updates 4 --out tests/benchmarks/results/peers.json

Every peer lives in an environment of its own, built from pinned versions in build/peers. All peers of a group are
started, warm up, and then take turns: in each sweep every peer makes some updates while the others wait, in an order
that moves on by one with every sweep. A ratio is ours over the peer's within a sweep; shown are its median and
quartiles. Tokens per second are those of the wall clock; tokens per CPU second are over the CPU time of the first
rank's process: they are what counts on a machine that other work disturbs.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TextIO

from tests.ranks import free_ports

ROOT = Path(__file__).parent.parent.parent.parent
FOLDER = ROOT / "build" / "peers"
TOKENS = 8 * 256  # of a rank's update

TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "hf": ("transformers==5.23.0", "accelerate==1.15.0"),
    "litgpt": ("litgpt==0.5.13",),
    "deepspeed": ("deepspeed==0.19.8", "transformers==5.23.0"),
    "torchtitan": ("torchtitan==0.3.0",),
}


@dataclass(frozen=True)
class Peer:
    """One way to train: a script, its settings, and where it runs. `environment` None is this one: ours."""

    name: str
    script: str
    settings: tuple[str, ...] = ()
    environment: str | None = None


FAST = ("--compile", "--matmul", "medium")
OURS = ("--matmul", "medium")  # what `llmtrain train` sets by itself
LOW = ("--precision", "bf16")
GROUPS: dict[str, tuple[int, tuple[Peer, ...]]] = {
    "fp32": (
        1,
        (
            Peer("llmtrain", "ours", OURS),
            Peer("llmtrain, compiled", "ours", FAST),
            Peer("HF Trainer", "hf_trainer", (), "hf"),
            Peer("HF Trainer, fastest", "hf_trainer", FAST, "hf"),
            Peer("HF Llama, bare loop", "hf_loop", (), "hf"),
            Peer("HF Llama, bare loop, fastest", "hf_loop", FAST, "hf"),
            Peer("litgpt pretrain", "litgpt_pretrain", ("--compile",), "litgpt"),
            Peer("litgpt pretrain, fastest", "litgpt_pretrain", FAST, "litgpt"),
            Peer("torchtitan trainer", "torchtitan_trainer", (), "torchtitan"),
            Peer("torchtitan trainer, fastest", "torchtitan_trainer", FAST, "torchtitan"),
        ),
    ),
    "bf16": (
        1,
        (
            Peer("llmtrain", "ours", (*OURS, *LOW)),
            Peer("llmtrain, compiled", "ours", (*FAST, *LOW)),
            Peer("HF Trainer", "hf_trainer", LOW, "hf"),
            Peer("HF Llama, bare loop", "hf_loop", LOW, "hf"),
            Peer("HF Llama, bare loop, fastest", "hf_loop", (*FAST, *LOW), "hf"),
            Peer("litgpt pretrain", "litgpt_pretrain", ("--compile", *LOW), "litgpt"),
            Peer("torchtitan trainer", "torchtitan_trainer", LOW, "torchtitan"),
            Peer("torchtitan trainer, fastest", "torchtitan_trainer", (*FAST, *LOW), "torchtitan"),
        ),
    ),
    **{
        f"2 ranks, {precision}": (
            2,
            (
                Peer("llmtrain, FSDP2", "ours", (*OURS, *low)),
                *(Peer(f"llmtrain, ZeRO-{n}", "ours", ("--stage", str(n), *OURS, *low)) for n in (1, 2, 3)),
                Peer("HF Llama, bare FSDP2", "fsdp_loop", low, "hf"),
                Peer("torchtitan trainer, FSDP2", "torchtitan_trainer", low, "torchtitan"),
                *(
                    Peer(f"HF Llama, bare ZeRO-{n}", "deepspeed_loop", ("--stage", str(n), *low), "deepspeed")
                    for n in (1, 2, 3)
                ),
            ),
        )
        for precision, low in (("fp32", ()), ("bf16", LOW))
    },
}


class Running:
    """One peer's processes, waiting for their turn."""

    def __init__(self, peer: Peer, ranks: int, logs: Path) -> None:
        self.peer = peer
        python = sys.executable if peer.environment is None else str(build(peer.environment))
        command = [python, "-m", f"tests.benchmarks.peers.{peer.script}", *peer.settings]
        [port] = free_ports(1)
        self.processes = []
        for rank in range(ranks):
            alone = {} if ranks == 1 else {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            given = {**alone, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
            environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(ranks)}
            environment |= {"OMP_NUM_THREADS": str(threads(ranks))}
            log = (logs / f"{peer.name.replace(' ', '_')}_{rank}.log").open("w")
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )

    def answer(self) -> dict[str, float]:
        """What the first rank says next. Raises RuntimeError where it ended instead."""
        line = _pipe(self.processes[0].stdout).readline()
        if not line:
            raise RuntimeError(f"{self.peer.name} ended: see its log")
        found: dict[str, float] = json.loads(line)
        return found

    def turn(self, updates: int) -> dict[str, float]:
        """Make so many updates."""
        pipe = _pipe(self.processes[0].stdin)
        pipe.write(f"{updates}\n")
        pipe.flush()
        return self.answer()

    def end(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def threads(ranks: int) -> int:
    """Threads of each rank: they share the machine's cores."""
    return max(1, (os.cpu_count() or 1) // ranks)


def build(name: str) -> Path:
    """The interpreter of an environment, made where it is not there yet."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first: with it in place, nothing else decides which build of it is taken.
        subprocess.run([*install, TORCH, "-c", str(ROOT / "constraints.txt")], check=True)
        subprocess.run([*install, TORCH, *ENVIRONMENTS[name]], check=True)
        done.touch()
    return python


def measure(group: str, sweeps: int, updates: int) -> dict[str, Any]:
    """Rates of every peer of a group, by sweep. A peer that fails is told and left out."""
    ranks, peers = GROUPS[group]
    logs = FOLDER / "logs" / group.replace(" ", "_")
    logs.mkdir(parents=True, exist_ok=True)
    running: list[Running] = []
    failed: list[str] = []
    for peer in peers:  # one after another: compilers of all at once would take the memory
        started = Running(peer, ranks, logs)
        try:
            started.answer()
            running.append(started)
            print(f"  {group}: {peer.name} is warm", file=sys.stderr, flush=True)
        except RuntimeError as error:
            failed.append(str(error))
            started.end()
    rates: dict[str, dict[str, list[float]]] = {one.peer.name: {"wall": [], "cpu": []} for one in running}
    try:
        for sweep in range(sweeps):
            at = sweep % len(running)
            for one in running[at:] + running[:at]:
                taken = one.turn(updates)
                tokens = updates * TOKENS * ranks
                rates[one.peer.name]["wall"].append(tokens / taken["seconds"])
                rates[one.peer.name]["cpu"].append(tokens / ranks / taken["cpu_seconds"])
    finally:
        for one in running:
            one.end()
    return {"ranks": ranks, "rates": rates, "failed": failed, "load": os.getloadavg()[0]}


def summarise(rates: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row a peer: its median rates, and ours over them, as [lower quartile, median, upper quartile]."""
    ours = [name for name in rates if name.startswith("llmtrain")]
    rows = []
    for name, found in rates.items():
        row: dict[str, Any] = {"peer": name}
        for clock in ("wall", "cpu"):
            row[f"tokens_per_{clock}_s"] = round(median(found[clock]), 1)
            row[f"ratios_{clock}"] = {
                one: _quartiles([a / b for a, b in zip(rates[one][clock], found[clock], strict=True)])
                for one in ours
                if one != name
            }
        rows.append(row)
    return rows


def _quartiles(values: Sequence[float]) -> list[float]:
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return [round(low, 3), round(middle, 3), round(high, 3)]


def _pipe(stream: Any) -> TextIO:
    assert stream is not None
    opened: TextIO = stream
    return opened


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    kept = json.loads(given.out.read_text()) if given.out is not None and given.out.exists() else {"groups": {}}
    for group in given.groups:
        found = measure(group, given.sweeps, given.updates)
        rows = summarise(found["rates"])
        kept["groups"][group] = {
            "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "load": round(found["load"], 1)},
            "threads_a_rank": threads(found["ranks"]),
            "sweeps": given.sweeps,
            "updates_a_turn": given.updates,
            "failed": found["failed"],
            "peers": rows,
        }
        print(f"{group}: tokens/s, tokens per CPU second, and ours over it (quartiles, CPU time)")
        for row in rows:
            ratios = ", ".join(f"{one} {low}-{mid}-{high}" for one, (low, mid, high) in row["ratios_cpu"].items())
            print(f"  {row['peer']:30} {row['tokens_per_wall_s']:8.0f} {row['tokens_per_cpu_s']:8.0f}   {ratios}")
        kept["command"] = " ".join(["python -m tests.benchmarks.peers.compare", *sys.argv[1:]])
        kept["versions"] = {"torch": TORCH, **ENVIRONMENTS}
        if given.out is not None:
            given.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
