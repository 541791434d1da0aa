"""Which probes are there, and how do they all answer in seconds?"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from llmtrain.config import Config
from llmtrain.doctor import cluster, machine, run
from llmtrain.doctor.finding import WITHIN_S, Finding


def examine(config: Config | None, environment: Mapping[str, str], prepare_command: str) -> list[Finding]:
    """Every probe, side by side. With a config, its folders, data and logging too."""
    probes: dict[str, Callable[[], list[Finding]]] = {
        "packages": machine.packages,
        "torch": machine.torch_build,
        "gpu": machine.gpus,
        "infiniband": lambda: machine.infiniband(Path("/sys/class/infiniband")),
        "limits": machine.limits,
        "environment": lambda: machine.variables(environment),
        "caches": lambda: run.caches(environment),
        "slurm": lambda: cluster.slurm(environment),
    }
    if config is not None:
        probes |= {
            "run folder": lambda: run.run_folder(config),
            "data": lambda: run.data(config, prepare_command),
            "wandb": lambda: run.wandb(config, environment),
        }
    found: dict[str, list[Finding]] = {}
    threads = {name: threading.Thread(target=_run, args=(name, probes[name], found), daemon=True) for name in probes}
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(2 * WITHIN_S)
        if thread.is_alive():
            hung = f"no answer within {2 * WITHIN_S:g} s"
            found[name] = [Finding(name, "wrong", hung, "a file system or a service hangs: try it by hand")]
    return [finding for name in probes for finding in found[name]]


def _run(name: str, probe: Callable[[], list[Finding]], found: dict[str, list[Finding]]) -> None:
    try:
        found[name] = probe()
    except OSError as error:
        found[name] = [Finding(name, "wrong", str(error), "see whether the path is there and readable")]
