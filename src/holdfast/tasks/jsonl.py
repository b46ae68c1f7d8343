"""Tasks from JSONL: a folder with one sub-folder a task, each with train.jsonl and test.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from holdfast.tasks.options import SourceOptions
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import STANDARD, Columns, to_example
from holdfast.tasks.task import Example, Task


class JsonlSource(SourceOptions):
    """``<path>/<task>/{train,test}.jsonl``.

    A row is ``{"prompt", "completion"[, "references"]}`` or ``{"messages"}``.
    A ``labels.json`` beside them (a list of texts) gives the allowed answers.
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
        folder = self.path.expanduser() / name
        train = read_jsonl(folder / "train.jsonl", problems, self.columns)
        tested = self.test_split == "test"
        test = read_jsonl(folder / "test.jsonl", problems, self.columns) if tested else []
        return Task(name, train, test, options=read_labels(folder / "labels.json", problems))


def task_folders(path: Path, file: str, setting: str, problems: Problems) -> list[str]:
    """Names of the sub-folders that hold `file`, sorted; a missing or empty folder is a problem."""
    root = path.expanduser()
    if not root.is_dir():
        problems.add(setting, f"no folder '{path}' (looked in {root.resolve()})")
        return []
    names = sorted(child.name for child in root.iterdir() if (child / file).is_file())
    if not names:
        what = (
            f"it holds {file} itself: give the folder above it" if (root / file).is_file() else "found none"
        )
        problems.add(setting, f"'{path}' must have a sub-folder with {file} for each task; {what}")
    return names


def read_jsonl(path: Path, problems: Problems, columns: Columns = STANDARD) -> list[Example]:
    """The examples of one JSONL file; faults are noted with file and line, empty lines are skipped."""
    examples: list[Example] = []
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.add(path, f"can't be read: {error.strerror or error}")
        return examples
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.add_row(where, f"not UTF-8 (byte {error.start + 1} of the line)")
        except (json.JSONDecodeError, RecursionError) as error:
            problems.add_row(where, f"not JSON ({error}): {line.decode('utf-8')[:60]!r}")
        else:
            example = to_example(row, where, problems, columns)
            if example is not None:
                examples.append(example)
    note_if_empty(examples, path, problems)
    return examples


def note_if_empty(examples: list[Example], where: object, problems: Problems) -> None:
    """A data set without one usable row is a problem, unless its rows are named as problems already."""
    if not examples and not any(problem.startswith(str(where)) for problem in problems.found):
        skipped = any(problem.startswith(str(where)) for problem in problems.skipped)
        problems.add(where, "no usable row is left after skipping" if skipped else "the data set is empty")


def load_task(path: str | Path, columns: Columns = STANDARD) -> Task:
    """One task from a folder with train.jsonl and perhaps test.jsonl, or from one JSONL file.

    Raises
    ------
    DataError
        There is no such data, or it is empty or malformed; every bad line is named.
    """
    problems, root = Problems(), Path(path).expanduser()
    train, test = (root / "train.jsonl", root / "test.jsonl") if root.is_dir() else (root, None)
    if not train.is_file():
        problems.add("data", f"no '{train}'; give a JSONL file, or a folder with train.jsonl in it")
        problems.raise_if_any()
    examples = read_jsonl(train, problems, columns)
    held_out = read_jsonl(test, problems, columns) if test is not None and test.is_file() else []
    problems.raise_if_any()
    name = root.name if root.is_dir() else root.stem
    return Task(name or root.resolve().name, examples, held_out)


def read_labels(path: Path, problems: Problems) -> tuple[str, ...]:
    """The allowed answers in a labels.json (a list of texts); nothing if there is no such file."""
    if not path.is_file():
        return ()
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        problems.add(path, f"not JSON ({error})")
        return ()
    if not isinstance(labels, list) or not labels or not all(isinstance(item, str) for item in labels):
        problems.add(path, f"must be a list of texts, got {labels!r:.60}")
        return ()
    return tuple(labels)
