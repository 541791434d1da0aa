"""How are the numbers of one GPU shown? As a table of speeds, one of kernels, and a line for everything else."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

RATES = ("micro", "recompute", "update s", "tokens/s", "MFU", "GiB", "planned", "of plan", "x HF", "launch s")


def show(result: dict[str, Any]) -> None:
    """Print all that a result knows."""
    rates = _table(f"{result['device']['name']}: rates and memory", RATES)
    kernels = _table("Kernels of two updates", ("class", "ms", "share"))
    notes = []
    for name, part in result["parts"].items():
        if part.get("why"):
            notes.append(f"{name}: {part['why']}")
        for row in part.get("rows", ()):
            if "tokens_per_s" in row:
                rates.add_row(name, *_speed(row, _beside(result, name)))
                _add_kernels(kernels, name, row.get("kernels") or {})
            else:
                notes.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False, highlight=False)
    console.print(rates)
    console.print(kernels)
    for line in notes:
        console.print(line, soft_wrap=True)


def _speed(row: dict[str, Any], theirs: float | None) -> list[str]:
    memory, planned = row["memory_gib"], row.get("planned_gib")
    return [
        str(row.get("micro", "-")),
        str(row.get("activation_checkpointing", "-")),
        f"{row['step_s']:.4f}",
        f"{row['tokens_per_s']:,.0f}",
        _percent(row["mfu"]),
        f"{memory:.2f}",
        "-" if planned is None else f"{planned:.2f}",
        "-" if planned is None else _percent(memory / planned),
        "-" if theirs is None else f"{row['tokens_per_s'] / theirs:.3f}",
        "-" if "launch_to_first_update_s" not in row else f"{row['launch_to_first_update_s']:.1f}",
    ]


def _beside(result: dict[str, Any], name: str) -> float | None:
    """Tokens a second of Hugging Face's loop on the same shape."""
    rows = result["parts"].get(f"{name.split()[0]} hf", {}).get("rows", [])
    return rows[0]["tokens_per_s"] if rows else None


def _add_kernels(table: Table, name: str, found: dict[str, Any]) -> None:
    classes = found.get("ms_of_two_updates", {})
    for kind, ms in classes.items():
        table.add_row(name, kind, f"{ms:.1f}", _percent(ms / sum(classes.values())))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("case")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
