"""How are the numbers of one GPU shown? As two tables, and a line for everything that has no numbers."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    """Two tables: rates and memory, and where an update's time goes; then what is missing, and why."""
    columns = ("micro", "recompute", "update s", "tokens/s", "MFU", "HFU", "GiB", "planned", "of plan", "x HF")
    rates = _table(f"{result['device']['name']}: rates and memory", columns)
    first = ("data", "forward", "backward", "optimizer", "log", "other")
    times = _table("Of an update's time, every phase waited for", first)
    notes = []
    for label, shape in result["shapes"].items():
        for engine, case in shape["cases"].items():
            name = f"{label} {engine}"
            if case["why"] is not None:
                notes.append(f"{name}: {case['why']}")
            if not case["measured"]:
                continue
            numbers = (case["micro"], case["recompute"], f"{case['step_s']:.4f}", f"{case['tokens_per_s']:,.0f}")
            shares = (_percent(case["mfu"]), _percent(case["hfu"]))
            held = (_plain(case["memory_gib"]), _plain(case["planned_gib"]), _percent(case["memory_of_plan"]))
            rates.add_row(name, *map(str, (*numbers, *shares, *held)), _plain(case["ratio_to_hf"], 3))
            if case["phases_s"]:
                whole = sum(case["phases_s"].values())
                times.add_row(name, *(_percent(case["phases_s"].get(phase, 0.0) / whole) for phase in first))
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    console.print(rates)
    console.print(times)
    for line in notes:
        console.print(line, soft_wrap=True)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("case")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
