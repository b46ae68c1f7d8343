"""A table above the bars of a terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from holdfast.progress import Progress


def test_what_is_shown_above_the_bars_is_drawn_again_as_it_changes():
    out = io.StringIO()
    cells = ["first"]

    def picture() -> Table:
        table = Table("row")
        table.add_row(*cells)
        return table

    with Progress(console=Console(file=out, force_terminal=True, width=100)) as progress:
        progress.show_above(picture)
        with progress.bar("cells", total=3) as bar:
            bar.show(1)
            assert progress._rich is not None
            progress._rich.refresh()  # it does so ten times a second
            cells[0] = "second"
            progress._rich.refresh()
        progress.show_above(None)
        progress._rich.refresh()
        drawn = out.getvalue()
    assert "second" not in out.getvalue().removeprefix(drawn)
    assert drawn.index("first") < drawn.index("second")
    assert "cells" in drawn


def test_without_a_terminal_nothing_is_drawn():
    out = io.StringIO()
    with Progress(console=Console(file=out)) as progress:
        progress.show_above(lambda: "never")
        progress.say("a line")
    assert out.getvalue() == "a line\n"
