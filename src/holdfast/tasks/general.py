"""General text from a file, to be learned in a small share of the rows: what a model was pretrained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from holdfast.config import Options
from holdfast.errors import DataError
from holdfast.places import Input, local_path
from holdfast.tasks.load import load_task
from holdfast.tasks.rows import Columns
from holdfast.tasks.task import Example


class GeneralOptions(Options):
    """A file of text, and how much of it."""

    file: Input = Field(
        description="a .txt file with a text a line, a .jsonl with the column text, or any other data set "
        "that can be learned"
    )
    share: float = Field(0.01, gt=0, lt=1, description="of all rows that a task trains on")


def read_texts(path: str) -> list[Example]:
    """The rows of a file, as `load_task` reads them; of a .txt file each line is one, and is learned whole.

    Raises
    ------
    DataError
        There is no such file, or it is empty or malformed.
    """
    try:
        rows = _rows(path)
    except DataError as error:
        raise DataError(f"replay.general.file: {error}") from error
    if Path(path).suffix.lower() != ".txt":
        return rows
    return [Example.text(line) for row in rows for line in row.completion.split("\n")]


def _rows(path: str) -> list[Example]:
    try:
        return list(load_task(path).train)
    except DataError:
        if local_path(path).is_file():
            with suppress(DataError):  # a text, whatever stands beside it
                return list(load_task(path, Columns(text="text")).train)
        raise


def with_texts(rows: Sequence[Example], texts: Sequence[Example], share: float, seed: str) -> list[Example]:
    """Rows and texts in random order, `share` of them texts; each text once before any comes again."""
    draw, wanted, taken = random.Random(seed), round(len(rows) * share / (1 - share)), list[Example]()
    while len(taken) < wanted:
        taken += draw.sample(list(texts), min(len(texts), wanted - len(taken)))
    mixed = [*rows, *taken]
    draw.shuffle(mixed)
    return mixed
