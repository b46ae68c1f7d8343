"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.messages import console

Csv = Annotated[Path | None, typer.Option("--csv", help="write the table as CSV to this file")]
Latex = Annotated[Path | None, typer.Option("--latex", help="write the table as LaTeX to this file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as training.epochs=5 strategy=ewc")
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="KEY=COLUMN",
        help="which column is which, where the data have other names: prompt=question, completion=answer; "
        "a text with {column} in it combines several; also references, messages, text, and turns=all: each "
        "answer of a chat",
    ),
]


def write_tables(csv: Path | None, latex: Path | None, as_csv: str, as_latex: str) -> None:
    """Write a table where ``--csv`` and ``--latex`` say."""
    from holdfast.storage import write_text

    for file, text in ((csv, as_csv), (latex, as_latex)):
        if file is not None:
            write_text(file, text)
            console.print(f"Written: {file}", highlight=False, markup=False, soft_wrap=True)
