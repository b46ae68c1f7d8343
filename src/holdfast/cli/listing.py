"""The command that lists what a config can name."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from holdfast.cli.messages import told
from holdfast.cli.options import Csv, Latex, write_tables


class Listing(StrEnum):
    """What can be listed."""

    strategies = "strategies"
    tasks = "tasks"
    orders = "orders"
    importances = "importances"
    metrics = "metrics"
    mechanisms = "mechanisms"
    controls = "controls"
    operators = "operators"


def list_command(
    what: Annotated[Listing, typer.Argument(metavar="WHAT", help="what to list")],
    csv: Csv = None,
    latex: Latex = None,
) -> None:
    """Show what can be named in a config.

    Example: holdfast list strategies
    """
    with told():
        from holdfast.runner.table import listing

        shown = listing(what.value)
        write_tables(csv, latex, shown.csv(), shown.latex())
        Console().print(shown)
