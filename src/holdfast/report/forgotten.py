"""Answers that were right after learning and wrong at the end: what forgetting looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from holdfast.records import Prediction
from holdfast.report.read import RunRecord, StageRecord

SHOWN = 5  # examples a task
RIGHT = 50.0  # of 100: exact answers score 0 or 100, ROUGE-L in between
_LONGEST = 600  # characters of a prompt or an answer


@dataclass(frozen=True)
class Example:
    """One forgotten answer."""

    prompt: str
    expected: str
    learned: str
    final: str


@dataclass(frozen=True)
class ForgottenTask:
    """How many of a task's answers were lost, and a few of them, the largest drops first."""

    task: str
    right: int
    lost: int
    examples: tuple[Example, ...]


def forgotten(runs: Sequence[RunRecord]) -> list[ForgottenTask]:
    """Compare each task's answers right after it was learned with those after the last stage.

    Several runs are those of one method: they are counted together, and the first shows examples. Tasks of
    which nothing was lost, and runs that kept no predictions, are left out.
    """
    found: dict[str, list[ForgottenTask]] = {}
    for run in runs:
        for stage in run.stages[:-1] if not run.joint else ():
            task = _compare(stage, run.stages[-1])
            found.setdefault(task.task, []).append(task)
    return [
        ForgottenTask(
            name,
            sum(task.right for task in tasks),
            sum(task.lost for task in tasks),
            next(task.examples for task in tasks if task.lost),
        )
        for name, tasks in found.items()
        if any(task.lost for task in tasks)
    ]


def _compare(stage: StageRecord, last: StageRecord) -> ForgottenTask:
    right = 0
    drops: list[tuple[float, int, Prediction, Prediction]] = []
    pairs = zip_longest(stage.predictions(stage.task), last.predictions(stage.task))
    for row, (before, after) in enumerate(pairs):
        if before is None or after is None or before.prompt != after.prompt:
            break  # the two files are of different test sets; what follows can't be compared
        right += before.score >= RIGHT
        if before.score >= RIGHT > after.score:
            drops.append((after.score - before.score, row, before, after))
    drops.sort(key=lambda drop: drop[:2])
    examples = tuple(
        Example(
            _cut(before.question),
            _cut(" / ".join(before.expected)),
            _cut(before.generated),
            _cut(after.generated),
        )
        for _, _, before, after in drops[:SHOWN]
    )
    return ForgottenTask(stage.task, right, len(drops), examples)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " …"
