"""The service installs and starts without torch, as its image does, and its manifests are what a cluster accepts."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.service import running

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "launch" / "k8s"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((FOLDER / "schedule-service.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_the_image_s_steps_make_a_service_without_torch(tmp_path: Path) -> None:
    """The image would carry two gigabytes of torch, or not start at all."""
    tree, environment = tmp_path / "tree", tmp_path / "venv"
    tree.mkdir()
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, target = shlex.split(line)
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tree / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tree / target)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PATH"] = f"{environment / 'bin'}:{clean['PATH']}"
    installs = re.findall(r"^RUN (python -m pip install .*)$", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 1
    step = installs[0].replace("--no-cache-dir", "--quiet --no-compile")
    done = subprocess.run(["bash", "-ec", step], cwd=tree, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(tree)
    listed = subprocess.run(
        [environment / "bin" / "python", "-m", "pip", "list", "--format", "json"],
        env=clean,
        capture_output=True,
        check=True,
    )
    packages = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "fastapi" in packages and not packages & {"torch", "deepspeed", "datasets", "wandb", "sentencepiece"}
    program, *arguments = json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[0])
    arguments[arguments.index("8000")] = "0"
    with running(*arguments, command=[str(environment / "bin" / program)]) as service:
        assert service.rate(1000) == 1.5e-4
        assert b"<script" in service.ask("/").body
        assert service.stop() == 0


def test_the_image_runs_as_nobody_in_particular() -> None:
    """A hole in the service would be one in the machine."""
    assert re.search(r"^USER 10001$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^FROM python:3\.11-slim$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("kind", ["Deployment", "Service", "HorizontalPodAutoscaler"])
def test_manifests_fit_the_schemas_of_kubernetes(manifests: dict[str, Any], kind: str) -> None:
    """`kubectl apply` would refuse the file, or drop a misspelt field without a word."""
    kubernetes_validate.validate(manifests[kind], "1.30", strict=True)


def test_the_deployment_is_what_was_promised(manifests: dict[str, Any]) -> None:
    """The service would run once only, without bounds, or as root."""
    assert set(manifests) == {"Deployment", "Service", "HorizontalPodAutoscaler", "ServiceMonitor"}
    spec = manifests["Deployment"]["spec"]
    assert spec["replicas"] == 3
    [container] = spec["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"memory": "256Mi", "cpu": "250m"},
        "limits": {"memory": "512Mi", "cpu": "500m"},
    }
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert spec["template"]["spec"]["securityContext"]["runAsNonRoot"]
    assert {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("readiness", "liveness")} == {
        "/readyz",
        "/healthz",
    }
    assert container["args"] == json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[0])


def test_the_parts_find_each_other(manifests: dict[str, Any]) -> None:
    """Requests would go nowhere, and nobody would scale or watch the pods."""
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert (
        manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels == manifests["Service"]["spec"]["selector"]
    )
    scaler = manifests["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    assert scaler["minReplicas"] == 3
    monitor = manifests["ServiceMonitor"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1" and set(monitor["spec"]) == {"selector", "endpoints"}
    assert monitor["spec"]["selector"]["matchLabels"] == manifests["Service"]["metadata"]["labels"]
    [port] = manifests["Service"]["spec"]["ports"]
    assert monitor["spec"]["endpoints"] == [{"port": port["name"], "path": "/metrics", "interval": "15s"}]
