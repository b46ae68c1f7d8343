"""Predictions on disk: a JSON Lines file for each task, and how a task's name becomes part of a file name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.errors import DataError
from holdfast.records import Prediction
from holdfast.storage import write_text


def file_safe(name: str) -> str:
    """A task's name as a part of a file name; different names stay different.

    Letters, digits, blanks, ``-``, ``_`` and ``.`` stay. Every other character is written as the bytes of
    its UTF-8 form, ``%`` and two hexadecimal digits each: ``glue/mnli`` becomes ``glue%2Fmnli``.
    """
    return "".join(
        c if c.isalnum() or c in " -_." else "".join(f"%{byte:02X}" for byte in c.encode()) for c in name
    )


def predictions_file(folder: Path, task: str) -> Path:
    """Where the predictions for a task's test rows are, in the folder of a stage."""
    return folder / "predictions" / f"{file_safe(task)}.jsonl"


def write_predictions(folder: Path, task: str, predictions: Sequence[Prediction]) -> None:
    """Write the predictions of a `TaskScore` into the folder of a stage, one JSON object a line.

    Raises
    ------
    StorageError
        The disk is full, or the folder can't be written.
    """
    lines = [json.dumps(row.model_dump(), ensure_ascii=False) for row in predictions]
    write_text(predictions_file(folder, task), "\n".join(lines) + "\n")


def read_predictions(folder: Path, task: str) -> Iterator[Prediction]:
    """Read what `write_predictions` wrote, line by line; nothing where the predictions weren't kept.

    Raises
    ------
    DataError
        The file can't be read, or a line isn't a prediction; the message names the file and the line.
    """
    path = predictions_file(folder, task)
    if not path.is_file():
        return
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Prediction.of(
                        json.loads(line), f"{path}:{number}: not a prediction", Prediction.again()
                    )
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not a prediction ({error}). {Prediction.again()}") from error
