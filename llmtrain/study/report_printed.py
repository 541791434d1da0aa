"""What does a comparison look like on a terminal?"""

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed

from llmtrain.study.compare import Comparison
from llmtrain.study.report import Table, closing, entries_table, peaks_table, runs_table, sentences

PIPE_COLUMNS = 400  # a file has no edge: nothing is cut off
_FEW_RUNS = 30  # that the terminal lists one by one


def print_report(comparison: Comparison, *, schedules: bool = False) -> None:
    """Print tables and sentences. `schedules`: a table of these, with their areas, also where each was run once."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    runs = runs_table(comparison, speeds=True)
    replicated = any(len(entry.runs) > 1 for entry in comparison.entries)
    if replicated or (schedules and comparison.entries):
        print_table(console, entries_table(comparison))
    if len(runs.rows) <= _FEW_RUNS or not replicated:
        print_table(console, runs, None if not comparison.mismatches else "NOT RANKED: these runs cannot be compared")
    if comparison.fits:
        print_table(console, peaks_table(comparison))
    for mismatch in comparison.mismatches:
        print(mismatch)
    for reading in comparison.readings:
        for _, sentence in sentences(comparison, reading):
            print(sentence)
    for note in [*comparison.warnings, *closing(comparison)]:
        print(f"note: {note}")


def print_table(console: Console, table: Table, title: str | None = None) -> None:
    """Print a table without lines around it."""
    console.print(printed(table, title))


def printed(table: Table, title: str | None = None) -> Printed:
    """A table as rich draws it."""
    drawn = Printed(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.head):
        drawn.add_column(escape(name), justify="left" if i < table.left else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(escape(cell) for cell in row))
    return drawn
