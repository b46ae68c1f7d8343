"""What figures and tables show as one: a method, the mean of its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from holdfast.records import TrainingLog
from holdfast.report.read import RunRecord, StageRecord
from holdfast.report.summary import Group, mean_of

Key = TypeVar("Key")
Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One line of a figure, and one entry of a list.

    Attributes
    ----------
    record : RunRecord
        The mean of the runs, with the name of their method; of a single run that run.
    runs : tuple of RunRecord
        What it stands for.
    group : int
        Index of the method, which has its colour.
    """

    record: RunRecord
    runs: tuple[RunRecord, ...]
    group: int

    def of(self, run: RunRecord) -> str:
        """What tells one of its runs from the others: its seed or folder; nothing where it is alone."""
        return run.name.removeprefix(run.metrics.label) if len(self.runs) > 1 else ""


def lines_of(groups: Sequence[Group]) -> list[Line]:
    """A line a method; runs of other streams, or of a method with an unfinished one, have their own."""
    lines = []
    for i, group in enumerate(groups):
        if group.finished and group.mean_matrix() is not None:
            lines.append(Line(_mean_run(group), group.runs, i))
        else:
            lines += [Line(run, (run,), i) for run in group.runs]
    return lines


def _mean_run(group: Group) -> RunRecord:
    if len(group.runs) == 1:
        return replace(group.runs[0], name=group.label)
    metrics = [run.metrics for run in group.runs]
    update = {
        "matrix": group.mean_matrix(),
        "seconds": _by_key([m.seconds for m in metrics]),
        "kl_base": _each([m.kl_base for m in metrics]),
        "kl_new": _each([m.kl_new for m in metrics]),
        "harness": {
            key: _each([m.harness.get(key, []) for m in metrics])
            for key in dict.fromkeys(key for m in metrics for key in m.harness)
        },
    }
    stages = tuple(_mean_stage(stages) for stages in zip(*(run.stages for run in group.runs), strict=False))
    first = group.runs[0]
    return replace(first, name=group.label, metrics=metrics[0].model_copy(update=update), stages=stages)


def _mean_stage(stages: Sequence[StageRecord]) -> StageRecord:
    logs = [stage.training for stage in stages if stage.training is not None]
    loss = _by_key(
        [{step: value for step, value in log.loss if step is not None and value is not None} for log in logs]
    )
    return replace(stages[0], training=TrainingLog(loss=[[step, value] for step, value in loss.items()]))


def _by_key(rows: Sequence[Mapping[Key, float]]) -> dict[Key, float]:
    """The mean at each key that all have."""
    shared = [key for key in (rows[0] if rows else ()) if all(key in row for row in rows)]
    return {key: statistics.fmean(row[key] for row in rows) for key in shared}


def _each(rows: Iterable[Values]) -> list[float | None]:
    return [mean_of(values) for values in zip_longest(*rows)]
