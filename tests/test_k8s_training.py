"""The training jobs for Kubernetes are what a cluster accepts, and start the same door as everywhere else."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from llmtrain.config_file import load_config

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "launch" / "k8s"


def documents(name: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / name).read_text())}


JOB = documents("pretrain-job.yaml")["Job"]["spec"]
SERVICE = documents("pretrain-job.yaml")["Service"]
PYTORCHJOB = documents("pytorchjob.yaml")["PyTorchJob"]
REPLICAS = PYTORCHJOB["spec"]["pytorchReplicaSpecs"]


def words(pod: dict[str, Any]) -> list[str]:
    """What a pod runs."""
    [container] = pod["spec"]["containers"]
    return [*container["command"], *container["args"]]


@pytest.mark.parametrize("kind", ["Service", "Job"])
def test_the_job_fits_the_schemas_of_kubernetes(kind: str) -> None:
    """`kubectl apply` would refuse the file, or drop a misspelt field without a word."""
    kubernetes_validate.validate(documents("pretrain-job.yaml")[kind], "1.30", strict=True)


@pytest.mark.parametrize("role", ["Master", "Worker"])
def test_the_pods_of_the_pytorchjob_fit_the_schemas(role: str) -> None:
    """The operator would be given pods that no cluster starts."""
    replica = REPLICAS[role]
    assert set(replica) == {"replicas", "restartPolicy", "template"}
    pod = {"apiVersion": "v1", "kind": "Pod", **replica["template"]}
    kubernetes_validate.validate({**pod, "metadata": {**pod["metadata"], "name": "pod"}}, "1.30", strict=True)


def test_the_pytorchjob_is_what_its_operator_reads() -> None:
    """The operator ignores containers of another name, and pods that it does not start again end the run."""
    assert PYTORCHJOB["apiVersion"] == "kubeflow.org/v1"
    assert set(PYTORCHJOB["spec"]) == {"runPolicy", "pytorchReplicaSpecs"} and set(REPLICAS) == {"Master", "Worker"}
    assert set(PYTORCHJOB["spec"]["runPolicy"]) == {"backoffLimit", "cleanPodPolicy"}
    for replica in REPLICAS.values():
        [container] = replica["template"]["spec"]["containers"]
        assert (container["name"], replica["restartPolicy"]) == ("pytorch", "ExitCode")
    nodes = next(item["value"] for item in container["env"] if item["name"] == "NODES")
    assert int(nodes) == REPLICAS["Master"]["replicas"] + REPLICAS["Worker"]["replicas"]


def test_the_pods_of_the_job_find_each_other() -> None:
    """They would wait for a first pod whose name no resolver knows."""
    name = SERVICE["metadata"]["name"]
    assert JOB["template"]["spec"]["subdomain"] == name and SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"]
    assert SERVICE["spec"]["selector"] == {"job-name": documents("pretrain-job.yaml")["Job"]["metadata"]["name"]}
    asked = words(JOB["template"])
    assert f"--master-addr={name}-0.{name}" in asked and "--master-port=29500" in asked
    [container] = JOB["template"]["spec"]["containers"]
    values = {item["name"]: item.get("value") for item in container["env"]}
    assert int(values["NODES"]) == JOB["completions"] == JOB["parallelism"]
    assert JOB["completionMode"] == "Indexed"
    [rule] = [rule["onExitCodes"] for rule in JOB["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert rule["containerName"] == container["name"] and tuple(rule["values"]) == door().MISTAKES


@pytest.mark.parametrize("pod", [JOB["template"], REPLICAS["Worker"]["template"]], ids=["Job", "PyTorchJob"])
def test_each_pod_starts_the_door_with_a_config_that_loads(pod: dict[str, Any]) -> None:
    """A misspelt option would be found by a hundred pods at once."""
    [container] = pod["spec"]["containers"]
    asked = words(pod)
    assert asked[:2] == ["python", "launch/k8s/torchrun.py"] and (ROOT / asked[1]).is_file()
    at = asked.index("launch/pretrain.py")
    options = dict(word.split("=", 1) for word in asked[2:at])
    assert set(options) == {
        "--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port", "--shutdown-timeout"
    }  # fmt: skip
    assert int(options["--shutdown-timeout"]) < pod["spec"]["terminationGracePeriodSeconds"]
    [config] = [word.removeprefix("--config=") for word in asked[at + 1 :] if word.startswith("--config=")]
    overrides = [word.removeprefix("--set=") for word in asked[at + 1 :] if word.startswith("--set=")]
    loaded = load_config(ROOT / config, overrides)
    [shared] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared"]
    assert loaded.run.dir.startswith(f"{shared}/") and loaded.data.path.startswith(f"{shared}/")
    gpus = next(item["value"] for item in container["env"] if item["name"] == "GPUS_PER_NODE")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    loaded.batch.accumulation(int(gpus) * int(next(i["value"] for i in container["env"] if i["name"] == "NODES")))


def door() -> ModuleType:
    spec = importlib.util.spec_from_file_location("k8s_torchrun", FOLDER / "torchrun.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "handed_on"), [(2, 2), (3, 3), (4, 132), (1, 129), (-signal.SIGKILL, 128 + signal.SIGKILL)]
)
def test_a_pod_ends_with_what_its_ranks_ended_with(code: int, handed_on: int) -> None:
    """A misspelt config would be started forty times, or a lost node end the run for good."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="none")
    assert door().exit_code(ChildFailedError("pretrain", {1: failure})) == handed_on


def test_torchrun_s_own_code_is_replaced(tmp_path: Path) -> None:
    """The table above would hold, and the pod still end with 1."""
    script = tmp_path / "mistake.py"
    script.write_text("import sys\nsys.exit(2)\n")
    command = [sys.executable, FOLDER / "torchrun.py", "--nproc-per-node=1", "--standalone", script]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(r"exitcode\s*: 2", done.stderr)
