"""What does a job need on this cluster? `~/.config/llmtrain/cluster.yaml`, written once by a person or a site.

Every field may be left out. Values go to sbatch as they are; `setup` lines run at the start of the batch script.
"""

import re
from pathlib import Path

from pydantic import Field, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from llmtrain.config import Section
from llmtrain.config_file import parse_yaml, read_section
from llmtrain.errors import ConfigError

CLUSTER_FILE = Path("~/.config/llmtrain/cluster.yaml")


class Container(Section):
    """What pyxis starts the tasks in."""

    image: str | None = Field(None, description="null: no container")
    mounts: list[str] = Field([], description="beside the folder that the job is submitted from")

    @model_validator(mode="after")
    def _mounts_need_an_image(self) -> Self:
        if self.mounts and self.image is None:
            raise ValueError("mounts are of a container: write its image")
        return self


class Cluster(Section):
    """One cluster, or one partition of it."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    nodes: PositiveInt = 1
    gpus_per_node: int = Field(8, ge=0, description="0: one task a node, on its CPUs")
    cpus_per_node: PositiveInt | None = Field(None, description="for all ranks of a node; null: the partition's")
    time: str = Field("24:00:00", description="limit of one attempt, as sbatch takes it")
    attempts: PositiveInt = Field(20, description="starts of one job, at most")
    lead_s: PositiveInt = Field(300, description="tasks are told so long before the limit, until it was measured")
    options: dict[str, str] = Field({}, description="further options of sbatch, without the dashes")
    modules: list[str] = Field([], description="module load ...")
    setup: list[str] = Field([], description="shell lines, for example: source /work/venv/bin/activate")
    environment: dict[str, str] = {}
    container: Container = Container()

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        seconds_of(text)
        return text

    @field_validator("environment")
    @classmethod
    def _are_names(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f'"{name}" is not a name of an environment variable')
        return values

    @field_validator("options")
    @classmethod
    def _are_not_fields(cls, values: dict[str, str]) -> dict[str, str]:
        owned = {field.replace("_", "-") for field in cls.model_fields} | {"signal", "requeue", "open-mode", "output"}
        for name in values:
            if name in owned | {"ntasks-per-node", "gpus-per-node", "cpus-per-task", "job-name"}:
                raise ValueError(f'"{name}" is set by llmtrain slurm submit: use its field or option')
        return values


def read_cluster(path: Path | None) -> Cluster:
    """The cluster file named, else the one of this user, else the defaults. Raises ConfigError."""
    found = path or CLUSTER_FILE.expanduser()
    if path is None and not found.exists():
        return Cluster()
    try:
        values = parse_yaml(found.read_text(encoding="utf-8"), f"cluster file {found}")
    except OSError as error:
        raise ConfigError(f"cannot read cluster file {found}: {error.strerror}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"cluster file {found} must be a mapping with keys {', '.join(Cluster.model_fields)}")
    return read_section(Cluster, values, f"cluster file {found}")


def seconds_of(text: str) -> int:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise ValueError(f'"{text}" is not a time that sbatch reads: write HOURS:MINUTES:SECONDS or DAYS-HOURS')
    days, first, second, third = (int(part) if part is not None else None for part in found.groups())
    assert first is not None
    if days is not None:
        return 86400 * days + 3600 * first + 60 * (second or 0) + (third or 0)
    if third is not None:
        return 3600 * first + 60 * (second or 0) + third
    return 60 * first + (second or 0)
