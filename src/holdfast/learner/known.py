"""What a learner's folder keeps of a task beside the weights: its name, remarks, and rows to test it with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import DataError
from holdfast.storage import write_json, write_text
from holdfast.tasks.task import Example, Task

ABOUT = "task.json"
TEST = "test.jsonl"


def digest_of(task: Task) -> str:
    """SHA-256 of a task's rows: whether an earlier attempt was at the same ones."""
    return hashlib.sha256(repr((task.metric, task.options, task.train, task.test)).encode()).hexdigest()


def asked_digest_of(task: Task) -> str:
    """The same of what a task is asked alone, its test rows and how they are scored."""
    return hashlib.sha256(repr((task.metric, task.options, task.test)).encode()).hexdigest()


def write_task(
    folder: Path, task: Task, kept: Mapping[str, Any], remarks: Mapping[str, Any] | None = None
) -> None:
    """Keep a task's name, metric and test rows in the folder of its stage; training rows are not kept.

    Parameters
    ----------
    kept : mapping
        What else the learner must know of it.
    remarks : mapping, optional
        What somebody wants to be kept with it (``about``).
    """
    write_text(folder / TEST, "".join(json.dumps(e.record(), ensure_ascii=False) + "\n" for e in task.test))
    values = {
        "name": task.name,
        "metric": task.metric,
        "options": list(task.options),
        "train_rows": len(task.train),
        "test_rows": len(task.test),
        **({"same_as": task.same_as} if task.same_as else {}),
        **kept,
        **({"about": dict(remarks)} if remarks else {}),
    }
    write_json(folder / ABOUT, values)


def read_task(folder: Path) -> Task | None:
    """The task that `write_task` kept, without training rows; None where it kept none."""
    if not (folder / ABOUT).is_file():
        return None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    tests = Example.of_lines((folder / TEST).read_text(encoding="utf-8"))
    return Task(
        about["name"],
        (),
        tests,
        about["metric"],
        tuple(about["options"]),
        same_as=about.get("same_as", ""),
    )


def read_about(folder: Path) -> dict[str, Any]:
    """All that `write_task` kept beside the rows; nothing where it kept none.

    Raises
    ------
    DataError
        The file is torn.
    """
    file = folder / ABOUT
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: torn or changed ({error}). Bring it back from a backup.") from error
