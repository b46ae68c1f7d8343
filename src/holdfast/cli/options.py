"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from holdfast.cli.messages import console
from holdfast.errors import StorageError
from holdfast.progress import tell

KEYS = "[KEY=VALUE]..."


class Command(TyperCommand):
    """A command that, if it takes ``key=value``, says so where a key is given like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # of click or of typer's copy of it: known by its name
            key = getattr(error, "option_name", "").lstrip("-")
            takes_keys = any(parameter.metavar == KEYS for parameter in self.params)
            if type(error).__name__ == "NoSuchOption" and takes_keys and not error.possibilities:  # type: ignore[attr-defined]
                error.message += f". A key of the configuration is given as {key}=VALUE"  # type: ignore[attr-defined]
            raise


def new_file(file: Path | None) -> Path | None:
    """Of an option: refuse a file that can't be written before any work is done for it."""
    from holdfast.storage import refuse_what_can_not_be_written

    if file is not None:
        try:
            refuse_what_can_not_be_written(file)
        except StorageError as error:
            raise typer.BadParameter(str(error)) from error
    return file


def new_folder(folder: Path | None) -> Path | None:
    """The same of a folder to write into."""
    from holdfast.config import half_character
    from holdfast.storage import not_a_folder

    if folder is not None and half_character(str(folder)):
        raise typer.BadParameter(f"{str(folder)!a} is no text in UTF-8. Give another path.")
    if folder is not None and (why := not_a_folder(folder)):
        raise typer.BadParameter(f"{why}. Give another path.")
    return folder


Csv = Annotated[
    Path | None, typer.Option("--csv", callback=new_file, help="write the table as CSV to this file")
]
Latex = Annotated[
    Path | None, typer.Option("--latex", callback=new_file, help="write the table as LaTeX to this file")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar=KEYS, help="such as training.epochs=5 strategy=ewc")
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
            tell(console, f"Written: {file}")
