"""What does the batch script of a run say? `job.sbatch` beside this file, its blanks filled in.

`launch/slurm/pretrain.sbatch` is what `plain_script` gives: the same script, for people who write their own.
"""

import shlex
from pathlib import Path

from llmtrain.slurm.cluster_file import Cluster

_INTRODUCTION = """\
# Pretrain on the nodes of one Slurm job, which goes back into the queue until the run is finished.
#
#     sbatch --nodes=4 launch/slurm/pretrain.sbatch --config configs/7b_cosine.yaml --set engine.kind=fsdp
#
# Options of sbatch that stand before the script win over the lines below; what stands after it goes to llmtrain train.
# Submit from the root of the project, in the environment the job shall have. In an interactive allocation (salloc),
# run it with bash. docs/slurm.md tells more."""
_HEADER = """\
#SBATCH --job-name=llmtrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8          # one rank each; 0: one rank a node, on its CPUs
#SBATCH --cpus-per-task=64         # of a node, for all its ranks
#SBATCH --time=24:00:00            # of one attempt
#SBATCH --signal=USR1@300          # the tasks are told so many seconds before the limit; they save, and end
#SBATCH --requeue
#SBATCH --open-mode=append         # one log for all attempts
#SBATCH --output=slurm-%j.out
##SBATCH --partition=gpu
##SBATCH --account=project"""
_SITE = """\

# What this cluster needs: modules, the environment, the network between nodes, a container (pyxis).
# module load cuda/12.8
# source /work/venv/bin/activate
# export NCCL_SOCKET_IFNAME=ib0
# export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)-ib"   # where names need a suffix
inside=()
# inside+=(--container-image=/images/llmtrain.sqsh --container-mounts="$PWD" --container-workdir="$PWD")
"""


def plain_script() -> str:
    """The script of launch/slurm/."""
    return _filled(
        _INTRODUCTION,
        _HEADER,
        _SITE,
        attempts=20,
        fewest='"$SLURM_JOB_NUM_NODES"',
        llmtrain="python -m llmtrain",
        arguments='"$@"',
    )


def run_script(
    cluster: Cluster, *, name: str, run_dir: Path, submitted: Path, nodes: str, gpus: int, time: str, lead_s: int
) -> str:
    """The script of one run, whose code and config were copied to the folder `submitted`."""
    options = {
        "job-name": name,
        "nodes": nodes,
        **({"gpus-per-node": str(gpus)} if gpus else {}),
        "cpus-per-task": cluster.cpus_per_node,
        "time": time,
        "signal": f"USR1@{lead_s}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "output": f"{run_dir}/slurm-%j.out",
        **cluster.options,
    }
    lines = [_option(key, str(value)) for key, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    site = ["", *(f"module load {shlex.quote(module)}" for module in cluster.modules), *cluster.setup]
    site += [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()]
    site += [f"inside=({_container(cluster)})", ""]
    return _filled(
        f"# Written by llmtrain slurm submit: {name}, from the code and the config in {submitted}.",
        "\n".join(lines),
        "\n".join(site),
        attempts=cluster.attempts,
        fewest=nodes.partition("-")[0],
        llmtrain=f"python {shlex.quote(str(submitted / 'code'))}",
        arguments=f"--config {shlex.quote(str(submitted / 'config.yaml'))}",
    )


def _container(cluster: Cluster) -> str:
    if cluster.container.image is None:
        return ""
    mounts = "".join(f",{mount}" for mount in cluster.container.mounts)
    words = [f"--container-image={shlex.quote(cluster.container.image)}"]
    words.append(f'--container-mounts="$PWD:$PWD"{shlex.quote(mounts) if mounts else ""}')
    return " ".join([*words, '--container-workdir="$PWD"'])


def _option(name: str, value: str) -> str:
    """One line as sbatch reads it: in double quotes where there is a space, the name alone without a value."""
    if not value:
        return f"#SBATCH --{name}"
    return f'#SBATCH --{name}="{value}"' if " " in value else f"#SBATCH --{name}={value}"


def _filled(
    introduction: str, header: str, site: str, *, attempts: int, fewest: str, llmtrain: str, arguments: str
) -> str:
    text = (Path(__file__).parent / "job.sbatch").read_text(encoding="utf-8")
    blanks = {
        "INTRODUCTION": introduction,
        "HEADER": header,
        "SITE": site,
        "ATTEMPTS": str(attempts),
        "FEWEST": fewest,
        "LLMTRAIN": llmtrain,
        "ARGUMENTS": arguments,
    }
    for name, value in blanks.items():
        text = text.replace(f"@{name}@", value)
    return text
