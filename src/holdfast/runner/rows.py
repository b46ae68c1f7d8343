"""Which rows the stages of a run were learned from: whether they are those of its data now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.folder import PARTIAL
from holdfast.learner import Learner
from holdfast.learner.known import digest_of
from holdfast.storage import write_json
from holdfast.strategies import Stage

ROWS = "rows.json"  # in a stage: the digest of each task's rows


def keep_rows(folder: Path, stage: Stage) -> None:
    """Write into a stage's folder what tells its rows from others."""
    write_json(folder / ROWS, {task.name: digest_of(task) for task in stage.tasks})


def of_other_rows(path: Path, stages: Sequence[Stage]) -> Iterator[str]:
    """A sentence of each stage in a run's folder that was learned, or begun, from other rows than these."""
    for stage in stages:
        part = Learner.part(stage)
        for folder in (path / part, path / (part + PARTIAL)):
            file = folder / ROWS
            then = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            other = [t.name for t in stage.tasks if then is not None and then.get(t.name) != digest_of(t)]
            if other:
                yield f"{folder}: was learned from other rows of {', '.join(other)} than there are now."
