"""The arrows of the house: a room imports only from rooms below it, and some rooms never load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmtrain"

# From the ground up. Rooms on one line do not see each other.
FLOORS = [
    {"errors"},
    {"units", "presets"},
    {"config"},
    {"config_file", "trajectory"},
    {"rendezvous", "arrival", "heap", "descriptors", "device"},
    {"schedules", "distributed"},
    {"data", "model"},
    {"engines", "planner"},
    {"checkpoint"},
    {"train"},
    {"study", "serve", "slurm", "doctor"},
    {
        "cli_average",
        "cli_branch",
        "cli_checkpoint",
        "cli_compare",
        "cli_doctor",
        "cli_hf",
        "cli_law",
        "cli_bench",
        "cli_plan",
        "cli_schedule",
        "cli_serve",
        "cli_slurm",
        "cli_sweep",
    },
    {"cli"},
    {"__main__"},
]
TORCH_FREE = [
    "llmtrain.errors",
    "llmtrain.config",
    "llmtrain.config_file",
    "llmtrain.trajectory",
    "llmtrain.schedules",
    "llmtrain.schedules.summary",
    "llmtrain.data.order",
    "llmtrain.data.dataset",
    "llmtrain.data.manifest",
    "llmtrain.model.size",
    "llmtrain.model.initial",
    "llmtrain.planner.measured",
    "llmtrain.planner.plan",
    "llmtrain.train.metrics",
    "llmtrain.train.failures",
    "llmtrain.doctor.examine",
    "llmtrain.study.branch",
    "llmtrain.study.refine",
    "llmtrain.study.range_figure",
    "llmtrain.study.compare",
    "llmtrain.study.figures",
    "llmtrain.study.statistics",
    "llmtrain.study.record",
    "llmtrain.study.readings",
    "llmtrain.study.report_page",
    "llmtrain.study.report_data",
    "llmtrain.study.schedule_figure",
    "llmtrain.study.schedule_page",
    "llmtrain.study.schedule_shown",
    "llmtrain.study.notebook",
    "llmtrain.study.law.fitted",
    "llmtrain.study.law.ranking",
    "llmtrain.study.law.optimise",
    "llmtrain.study.schedule_view",
    "llmtrain.study.sweep_shown",
    "llmtrain.serve.app",
    "llmtrain.serve.server",
    "llmtrain.slurm.submit",
    "llmtrain.slurm.again",
    "llmtrain.slurm.status",
    "llmtrain.train.attempts",
    "llmtrain.train.stop",
    "llmtrain.cli",
]


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.append(node.module)
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return {room_of(module) for module in modules if module.startswith("llmtrain.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_below(path: Path) -> None:
    """A newcomer could no longer tell from the tree where a change belongs."""
    if path == PACKAGE / "__init__.py":
        assert imported_rooms(path) == set()
        return
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    height = {name: index for index, floor in enumerate(FLOORS) for name in floor}
    assert room in height, f"{room} has no floor: add it to FLOORS"
    for other in imported_rooms(path) - {room}:
        assert height[other] < height[room], f"{room} imports {other}, which is not below it"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_reports_and_previews_load_no_torch(module: str) -> None:
    """A preview or a report on a login node would take seconds to start."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_one_file_imports_deepspeed() -> None:
    """A user without DeepSpeed could not train with another engine."""
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "deepspeed" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed")
    }
    assert users == {"engines/deepspeed.py"}
