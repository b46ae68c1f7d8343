"""The command line in this process, on a terminal that breaks no line of a message."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from holdfast.cli import app

WIDE = {"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"}


def holdfast_cli(*arguments: object) -> Result:
    """What ``holdfast`` with these arguments says, and its exit code."""
    return CliRunner(env=WIDE).invoke(app, [str(a) for a in arguments])
