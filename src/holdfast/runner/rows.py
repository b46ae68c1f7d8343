"""Which rows the parts of a run were learned from, and asked: whether they are those of its data now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.learner.known import digest_of
from holdfast.storage import write_json
from holdfast.tasks.task import Task

ROWS = "rows.json"  # in a part: the digests of what its tasks are learned from, and of what they are asked


def keep_rows(folder: Path, learned: Sequence[Task], asked: Sequence[Task]) -> None:
    """Write into a part's folder what tells its rows from others."""
    learned_from = {task.name: digest_of(task) for task in learned}
    write_json(folder / ROWS, {"learned": learned_from, "asked": {t.name: _asked(t) for t in asked}})


def of_other_rows(path: Path, tasks: Sequence[Task]) -> Iterator[str]:
    """A sentence of each part of a run, begun or finished, whose rows aren't those of these tasks."""
    learned, asked = ({t.name: of(t) for t in tasks} for of in (digest_of, _asked))
    for file in sorted(path.rglob(ROWS)):
        then = json.loads(file.read_text(encoding="utf-8"))
        for key, now, what in (
            ("learned", learned, "was learned from other rows"),
            ("asked", asked, "was asked other test rows"),
        ):
            known = then.get(key, {})
            if other := [name for name, digest in known.items() if now.get(name, digest) != digest]:
                yield f"{file.parent}: {what} of {', '.join(other)} than there are now."
                break


def _asked(task: Task) -> str:
    return hashlib.sha256(repr((task.metric, task.options, task.test)).encode()).hexdigest()
