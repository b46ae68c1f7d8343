"""Tasks from JSONL: a folder with one sub-folder a task, each with train.jsonl and test.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from holdfast.places import local_path
from holdfast.tasks.files import read_json, read_rows
from holdfast.tasks.options import SourceOptions, fault_of
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import STANDARD, Columns, to_examples
from holdfast.tasks.task import Example, Task


class JsonlSource(SourceOptions):
    """``<path>/<task>/{train,test}.jsonl``.

    A row is ``{"prompt", "completion"[, "references"]}`` or ``{"messages"}``, or of another form that
    `form_of` knows. A ``labels.json`` beside them (a list of texts) gives the allowed answers.
    """

    source: Literal["jsonl"] = "jsonl"
    path: Path = Field(description="folder with one sub-folder a task")
    columns: Columns = Field(
        default=STANDARD, description="other names for prompt, completion, references, messages"
    )

    def title(self) -> str:
        return self.path.name

    def available(self, problems: Problems) -> list[str]:
        return task_folders(self.path, "train.jsonl", "tasks.path", problems)

    def read(self, name: str, problems: Problems, seed: int) -> Task:
        folder = local_path(self.path) / name
        train, form = read_examples(folder / "train.jsonl", problems, self.columns)
        tested = self.test_split == "test"
        test = read_examples(folder / "test.jsonl", problems, self.columns)[0] if tested else []
        return Task(name, train, test, options=read_labels(folder / "labels.json", problems), read_as=form)


def task_folders(path: Path, file: str, setting: str, problems: Problems) -> list[str]:
    """Names of the sub-folders that hold `file`, sorted; a missing or empty folder is a problem."""
    root = local_path(path)
    try:
        if not root.is_dir():
            problems.add(setting, f"no folder '{path}' (looked in {root.resolve()})")
            return []
        names = sorted(child.name for child in root.iterdir() if (child / file).is_file())
        alone = (root / file).is_file()
    except OSError as error:
        problems.add(setting, f"'{path}' can't be read: {error.strerror or error}")
        return []
    if not names:
        what = f"it holds {file} itself: give the folder above it" if alone else "found none"
        problems.add(setting, f"'{path}' must have a sub-folder with {file} for each task; {what}")
    return names


def read_examples(path: Path, problems: Problems, columns: Columns = STANDARD) -> tuple[list[Example], str]:
    """The examples of one file and the name of their form; faults are noted with file and line."""
    examples, form = to_examples(read_rows(path, problems), problems, columns)
    note_if_empty(examples, path, problems)
    return examples, form


def note_if_empty(examples: list[Example], where: object, problems: Problems) -> None:
    """A data set without one usable row is a problem, unless its rows are named as problems already."""
    if not examples and not any(problem.startswith(str(where)) for problem in problems.found):
        skipped = any(problem.startswith(str(where)) for problem in problems.skipped)
        problems.add(where, "no usable row is left after skipping" if skipped else "the data set is empty")


def read_labels(path: Path, problems: Problems) -> tuple[str, ...]:
    """The allowed answers in a labels.json (a list of texts); nothing if there is no such file."""
    if not path.is_file():
        return ()
    before = len(problems)
    labels = read_json(path, problems)
    if len(problems) > before:
        return ()
    if not isinstance(labels, list) or not labels or not all(isinstance(item, str) for item in labels):
        problems.add(path, f"must be a list of texts, got {labels!r:.60}")
        return ()
    if fault := fault_of(labels):
        problems.add(path, fault)
        return ()
    return tuple(labels)
