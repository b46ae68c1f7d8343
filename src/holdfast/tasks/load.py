"""One task from wherever a user has it: a file, a folder, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.places import is_local, local_path, near
from holdfast.tasks.files import FORMATS, is_saved, load_saved, read_rows, rows_of
from holdfast.tasks.jsonl import note_if_empty, read_examples, read_labels
from holdfast.tasks.problems import Problems, first_line
from holdfast.tasks.rows import STANDARD, Columns, to_examples, to_questions
from holdfast.tasks.task import Example, Task

if TYPE_CHECKING:
    from datasets import DatasetDict


_OTHER_COLUMNS = (
    "Other names of columns can be said: `--column prompt=NAME --column completion=NAME` to learn, "
    "attribute and ask, `columns: {prompt: NAME, completion: NAME}` in a configuration, Columns in Python."
)


def load_task(path: str | Path, columns: Columns = STANDARD) -> Task:
    """One task with its training rows and, where they are there, its test rows.

    Parameters
    ----------
    path : str or Path
        A .jsonl, .json, .csv, .tsv, .parquet or .txt file; a folder with such a file called ``train``, and
        perhaps one called ``test`` and a ``labels.json``; or the id of a data set on the hub.

    Raises
    ------
    DataError
        There is no such data, or it is empty or malformed; every bad row is named by its line, or by its
        number where the file has no lines.
    """
    problems, root = Problems(other_columns=_OTHER_COLUMNS), local_path(path)
    try:
        if root.is_dir():
            task = _folder(root, columns, problems)
        elif root.is_file() and root.suffix.lower() in FORMATS:
            examples, form = read_examples(root, problems, columns)
            task = Task(root.stem, examples, [], read_as=form)
        elif root.exists():
            problems.add("data", f"'{path}' is none of {', '.join(FORMATS)}, nor a folder")
        elif is_local(str(path), FORMATS):
            problems.add("data", f"no '{path}'; give {_wanted()}.{near(root)}")
        else:
            task = _hub(str(path), columns, problems)
    except OSError as error:
        problems.add("data", f"'{path}' can't be read: {error.strerror or error}")
    problems.raise_if_any()
    return task


def read_questions(path: Path, columns: Columns = STANDARD) -> tuple[list[dict[str, Any]], list[Example]]:
    """The rows of a file of questions, and what they ask; answers may be there or not.

    Raises
    ------
    DataError
        There is no such file, or it is empty or malformed.
    """
    problems, rows = Problems(other_columns=_OTHER_COLUMNS), []
    if not path.is_file() or path.suffix.lower() not in FORMATS:
        what = "none of" if path.is_file() else "no such file; questions are in one of"
        problems.add(path, f"{what} {', '.join(FORMATS)}{'' if path.exists() else '.' + near(path)}")
    else:
        rows = read_rows(path, problems)
    if columns.turns != STANDARD.turns:
        problems.add(
            "columns.turns", "it says what is learned of a chat, and nothing is learned here: leave it out"
        )
    questions = to_questions(rows, problems, columns)
    note_if_empty(questions, path, problems)
    problems.raise_if_any()
    return [dict(row) if isinstance(row, Mapping) else {"prompt": row} for _, row in rows], questions


def _wanted() -> str:
    return f"a file ({', '.join(FORMATS)}), or a folder with train.jsonl (or another of these) in it"


def _folder(root: Path, columns: Columns, problems: Problems) -> Task:
    name = root.name or root.resolve().name
    if is_saved(root):
        return _saved(root, name, columns, problems)
    train, test = (_part(root, part, problems) for part in ("train", "test"))
    if train is None:
        problems.add("data", f"no '{root / 'train.jsonl'}'; give {_wanted()}")
        problems.raise_if_any()
    examples, form = read_examples(train, problems, columns) if train is not None else ([], "")
    held_out = read_examples(test, problems, columns)[0] if test is not None else []
    options = read_labels(root / "labels.json", problems)
    return Task(name, examples, held_out, options=options, read_as=form)


def _part(root: Path, part: str, problems: Problems) -> Path | None:
    found = [root / f"{part}{suffix}" for suffix in FORMATS if (root / f"{part}{suffix}").is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        problems.add(root, f"which one is meant? It holds {names}: give one file, or leave one")
    return found[0] if found else None


def _saved(root: Path, name: str, columns: Columns, problems: Problems) -> Task:
    """What ``Dataset.save_to_disk`` wrote."""
    try:
        data = load_saved(root)
    except Exception as error:  # torn files fail in many ways below
        problems.add(root, f"can't be read: {first_line(error)}")
        problems.raise_if_any()
        raise
    return _splits(data, name, columns, problems)


def _hub(path: str, columns: Columns, problems: Problems) -> Task:
    from datasets import DatasetDict, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        data = load_dataset(path)
    except Exception as error:  # whatever it raises, the data can't be had
        cause = error.__cause__ or error
        problems.add(
            "data",
            f"no file or folder '{path}' (looked in {Path().resolve()}), and as a data set of the hub it "
            f"can't be loaded: {first_line(cause)}.{near(Path(path))}",
        )
        problems.raise_if_any()
        raise
    return _splits(data if isinstance(data, DatasetDict) else {"train": data}, path, columns, problems)


def _splits(data: DatasetDict | dict[str, object], name: str, columns: Columns, problems: Problems) -> Task:
    if "train" not in data:
        problems.add("data", f"'{name}' has no split 'train', only {', '.join(data)}: save one as a file")
        problems.raise_if_any()
    read: dict[str, tuple[list[Example], str]] = {}
    for split in ("train", "test"):
        if split in data:
            where = f"{name}[{split}]"
            read[split] = to_examples(rows_of(data[split], where), problems, columns)
            note_if_empty(read[split][0], where, problems)
    examples, form = read["train"]
    return Task(name, examples, read.get("test", ([], ""))[0], read_as=form)
