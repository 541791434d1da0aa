"""A real Slurm of two nodes on this machine, for tests: munged, slurmctld and two slurmd, all of it under one folder.

The nodes are named n0 and n1; both have the machine's cores, counted as CPUS each, so that jobs of several tests run
side by side, and as many GPUs, which are empty files. Nothing of the system's own Slurm or munge is touched, and only
processes that were started here are ended. Accounting is off. After a requeue Slurm holds a job back for two minutes:
`hurry` starts it at once.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.ranks import free_ports

NODES = ("n0", "n1")
CPUS = 8
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def missing() -> str:
    """What keeps a cluster from being started here; empty where nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm slurmctld slurmd munge"
    return "" if os.geteuid() == 0 else "the daemons of Slurm need root"


class Cluster:
    """The daemons, and the commands a user of the cluster has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": SEARCHED, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SLURMD_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start every daemon and wait until both nodes are idle."""
        for name in ("state", "spool_n0", "spool_n1"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        control, *ports = free_ports(1 + len(NODES))
        (self.folder / "slurm.conf").write_text(_slurm_conf(self.folder, control, ports))
        paths = {name: str(self.folder / f"munge.{name}") for name in ("socket", "log", "pid", "seed")}
        options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in paths.items()]
        for number in range(CPUS):
            (self.folder / f"gpu{number}").touch()
        gpus = f"Name=gpu File={self.folder}/gpu[0-{CPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {gpus}\n")
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._until(lambda: Path(paths["socket"]).exists(), "munged to open its socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.states() == dict.fromkeys(NODES, "IDLE"), "both nodes to be idle")

    def stop(self) -> None:
        """Cancel every job, end the daemons and the steps they left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self("scancel", "--user=root", check=False)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in self.daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __call__(self, *words: str | Path, check: bool = True, **environment: str) -> str:
        """Run one of Slurm's commands from the project's root; returns what it printed."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=Path(__file__).parent.parent,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + ("" if check else done.stderr)

    def submit(self, *words: str | Path, **environment: str) -> str:
        """`sbatch` with these words; returns the job's number."""
        return self("sbatch", "--parsable", *words, **environment).strip()

    def states(self) -> dict[str, str]:
        """The state of each node, for example IDLE, ALLOCATED or DOWN."""
        said = self("scontrol", "show", "nodes", "--oneliner", check=False)
        return dict(re.findall(r"NodeName=(\S+) .*? State=([A-Z]+)", said))

    def jobs(self) -> list[tuple[str, str]]:
        """Number and state of every job that is not over."""
        said = self("squeue", "--noheader", "--format=%i %T")
        return [(line.split()[0], line.split()[1]) for line in said.splitlines()]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by its words: JobState, ExitCode, Restarts, Requeue, NodeList ..."""
        said = self("scontrol", "show", "job", job, "--oneliner")
        return dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", said))

    def hurry(self, job: str) -> None:
        """Start a requeued job now, not in two minutes, with an hour to run whatever limit it had.

        Some seconds must lie between: a node refuses a job with the credentials of the second in which it ended it.
        """
        self._until(lambda: self._requeued_s(job) > 3, f"job {job} to be in the queue")
        self("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60", check=False)

    def wait(self, job: str, *, timeout_s: float = 180, log: Path | None = None) -> dict[str, str]:
        """Wait until a job is over, through all its requeues; returns `show`. Fails with the log on a timeout."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.show(job)
            if found["JobState"] in OVER:
                return found
            if found["JobState"] == "PENDING" and found["Restarts"] != "0" and found["Reason"] == "BeginTime":
                self.hurry(job)
            assert time.monotonic() < deadline, f"{found}\n{log.read_text() if log and log.exists() else ''}"
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._daemon(node, "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """What a power cut does: the node's slurmd and every process of its jobs are gone, and Slurm is told so."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for pid in self._processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def revive_node(self, node: str) -> None:
        """Start a killed node again, and wait until it takes jobs."""
        self.start_node(node)
        self._until(lambda: self.states()[node] != "DOWN", f"{node} to come back")

    def pids(self, job: str, node: str) -> list[int]:
        """The Python processes of a job on a node: its ranks."""
        return [pid for pid, found in self._found(node) if found.get("SLURM_JOB_ID") == job and _is_python(pid)]

    def _daemon(self, name: str, *words: str, program: str = "") -> None:
        path = shutil.which(program or name, path=SEARCHED)
        assert path is not None
        environment = {**self.environment, "SLURMD_NODENAME": name}  # the steps of a node inherit it
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(  # they end with this process, even where it is killed
                ["setpriv", "--pdeathsig=KILL", path, *words],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _requeued_s(self, job: str) -> float:
        """Seconds since a job came (back) into the queue."""
        return (datetime.now() - datetime.fromisoformat(self.show(job)["SubmitTime"])).total_seconds()

    def _processes(self, node: str | None = None) -> list[int]:
        return [pid for pid, _ in self._found(node)]

    def _found(self, node: str | None) -> Iterator[tuple[int, dict[str, str]]]:
        """Every process of this cluster's jobs, and steps, with its environment: SLURM_CONF is that of this folder."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError):
                pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                found = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if found.get("SLURM_CONF") != self.environment["SLURM_CONF"] or int(entry.name) == os.getpid():
                    continue
                if node is None or found.get("SLURMD_NODENAME") == node:
                    yield int(entry.name), found

    def _until(self, ready: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}\n{logs}"
            assert all(process.poll() is None for process in self.daemons.values()), logs
            time.sleep(0.05)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster of this process's tests; they are skipped where none can be started."""
    if problem := missing():
        pytest.skip(problem)
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        running = Cluster(Path(name))
        try:
            running.start()
            yield running
        finally:
            running.stop()


def _slurm_conf(folder: Path, control: int, ports: list[int]) -> str:
    host = socket.gethostname()
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres=gpu:{CPUS}"
        for node, port in zip(NODES, ports, strict=True)
    ]
    return "\n".join(
        [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={control}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={folder}/munge.socket",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool_%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd_%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdLogFile={folder}/slurmd_%n.log",
            "SlurmdParameters=config_overrides",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0",
            "GresTypes=gpu",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/none",
            "JobRequeue=1",
            "ReturnToService=2",
            "SlurmdTimeout=300",
            "KillWait=5",
            "MinJobAge=3600",
            *nodes,
            f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO",
            "",
        ]
    )


def _is_python(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("python")
    return False
