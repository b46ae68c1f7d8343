"""The table of a sweep on the terminal, while it runs and at its end."""

from __future__ import annotations

from collections import Counter

from rich.table import Table
from rich.text import Text

from holdfast.records import Comparison
from holdfast.sweep.results import SHOWN, shown_difference, shown_score


def live_table(results: Comparison) -> Table:
    """A line a row and grid point: scores so far, differences from the reference, and how far it is."""
    reference = results.reference
    about = f"; Δ from {reference}, paired, with its 95 % interval" if reference else ""
    table = Table(caption=Text(f"percent, mean ± standard deviation{about}"))
    table.add_column("row", overflow="fold")
    for _, name in SHOWN:
        table.add_column(name, justify="right")
    if reference:
        table.add_column("Δ AP", justify="right")
    table.add_column("runs", justify="right")
    table.add_column("")
    for row in results.rows:
        counts = Counter(run.status for run in row.runs)
        cells = [shown_score(row, key) for key, _ in SHOWN]
        if reference:
            cells.append(shown_difference(row, "ap"))
        state = Text()
        if counts["failed"]:
            state.append(f"{counts['failed']} failed ", style="red")
        if counts["running"]:
            state.append("running", style="yellow")
        table.add_row(Text(row.label), *cells, f"{counts['finished']}/{len(row.runs)}", state)
    return table
