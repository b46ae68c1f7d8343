"""Which rows the parts of a run were learned from, and asked: whether they are those of its data now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from holdfast.learner.known import asked_digest_of, digest_of
from holdfast.storage import write_json
from holdfast.tasks.task import Task

ROWS = "rows.json"  # in a part: the digests of what its tasks are learned from, and of what they are asked


def keep_rows(folder: Path, learned: Sequence[Task], asked: Sequence[Task]) -> None:
    """Write into a part's folder what tells its rows from others."""
    write_json(folder / ROWS, digests(learned, asked))


def digests(learned: Sequence[Task], asked: Sequence[Task]) -> dict[str, dict[str, str]]:
    """What tells the rows of tasks from others, by name: of what is learned, and of what is asked."""
    return {
        "learned": {task.name: digest_of(task) for task in learned},
        "asked": {task.name: asked_digest_of(task) for task in asked},
    }


def of_other_rows(path: Path, now: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A sentence of each part of a run, begun or finished, whose rows aren't those of these `digests`."""
    for file in sorted(path.rglob(ROWS)):
        then = json.loads(file.read_text(encoding="utf-8"))
        for key, what in (("learned", "was learned from other rows"), ("asked", "was asked other test rows")):
            known = then.get(key, {})
            if other := [name for name, digest in known.items() if now[key].get(name, digest) != digest]:
                yield f"{file.parent}: {what} of {', '.join(other)} than there are now."
                break
