"""What the runs say in numbers: methods, columns and the comparison table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from holdfast.evaluation.compare import difference
from holdfast.quantities import duration, number
from holdfast.records import Difference
from holdfast.report.read import RunRecord


@dataclass(frozen=True)
class Column:
    """A metric of the table: its key, its short and long names, what it means, and which way is better."""

    key: str
    short: str
    name: str
    meaning: str
    higher_is_better: bool = True


COLUMNS = (
    Column(
        "ap", "AP", "average performance",
        "The mean accuracy over all tasks once the last one has been learned: what you end up with.",
    ),
    Column(
        "fwt", "FWT", "forward transfer",
        "The mean accuracy on each task but the first just before it is trained: what earlier tasks already "
        "taught.",
    ),
    Column(
        "bwt", "BWT", "backward transfer",
        "How much a task's accuracy changed, on average, between the moment it was learned and the end. "
        "Negative means forgotten; 0 means kept; positive means later tasks helped.",
    ),
    Column(
        "forgetting", "Forgetting", "forgetting",
        "How far each task ended below the best accuracy it had before the last task, on average. 0 means "
        "nothing was lost; negative means that the last task helped.",
        higher_is_better=False,
    ),
    Column(
        "learning_accuracy", "Learning", "learning accuracy",
        "The mean accuracy on each task right after training on it: a method that protects too much can't "
        "learn, and it shows here.",
    ),
    Column(
        "seconds", "Time", "total time",
        "Wall-clock time of the whole run: training, importance, evaluation, and what else was asked for. Of "
        "a task that was stopped and continued, that since it was continued, and what was trained before.",
        higher_is_better=False,
    ),
)  # fmt: skip


_TOLD = 3  # of the settings in which two methods of one label differ


@dataclass(frozen=True)
class Group:
    """Runs with the same label and setting: one method, several seeds."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def strategy(self) -> str:
        """Name of the strategy that the runs share."""
        return self.runs[0].metrics.strategy

    @property
    def joint(self) -> bool:
        """Whether it is the joint upper bound."""
        return self.runs[0].joint

    @property
    def tags(self) -> tuple[str, ...]:
        """What a fair comparison must know: an upper bound, the task told with each test, old examples."""
        metrics = self.runs[0].metrics
        if self.joint:
            return ("upper bound",)
        told = ("told the task", metrics.knows_task), ("keeps examples", metrics.rehearses)
        return tuple(tag for tag, is_so in told if is_so)

    @property
    def finished(self) -> bool:
        """Whether every run reached the end of its stream."""
        return all(run.metrics.finished for run in self.runs)

    def values(self, key: str) -> list[float]:
        """The measured values of one column, one a run."""
        found = [value_of(run, key) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, key: str) -> float | None:
        """Mean over the runs; None when nothing was measured."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def mean_matrix(self) -> list[list[float | None]] | None:
        """The element-wise mean of the runs' matrices; None when they are of different streams."""
        first = self.runs[0].metrics
        if any(run.metrics.tasks != first.tasks for run in self.runs):
            return None
        return [
            [mean_of([run.metrics.matrix[j][i] for run in self.runs]) for i in range(len(first.tasks))]
            for j in range(len(first.matrix))
        ]


@dataclass(frozen=True)
class Cell:
    """One number of the table, ready to print."""

    text: str
    spread: str = ""
    best: bool = False
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. `member` rows are the single seeds below their mean."""

    name: str
    group: int
    cells: tuple[Cell, ...]
    finished: bool
    member: bool = False
    tags: tuple[str, ...] = ()
    note: str = ""


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean, if all of them are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def value_of(run: RunRecord, key: str) -> float | None:
    """One column's value: a score in percent, or seconds."""
    if key == "seconds":
        return run.metrics.seconds.get("total")
    value: float | None = getattr(run.metrics, key)
    return value


def distinct(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Give runs that share a label names that tell them apart: by seed, or else by folder."""
    named = []
    for run in runs:
        peers = [r for r in runs if r.metrics.label == run.metrics.label]
        seeds = {r.metrics.seed for r in peers}
        name = run.metrics.label
        if len(peers) > 1 and len(seeds) == len(peers) and None not in seeds:
            name += f" · seed {run.metrics.seed}"
        elif len(peers) > 1:
            same_folder = len({r.path.name for r in peers}) < len(peers)
            name += f" · {run.path if same_folder else run.path.name}"
        named.append(replace(run, name=name))
    return named


def grouped(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs of one label and one setting, in the order in which they first appear.

    Where runs of one label differ in more than seed, order and place, what they differ in is added to it.
    """
    found: dict[str, dict[frozenset[tuple[str, str]], list[RunRecord]]] = {}
    for run in runs:
        kinds = found.setdefault(run.metrics.label, {})
        kinds.setdefault(frozenset(run.setting.items()), []).append(run)
    groups = []
    for label, kinds in found.items():
        shared = frozenset.intersection(*kinds)
        for members in kinds.values():
            own = [pair for pair in members[0].setting.items() if pair not in shared]
            told = [f"{key.rpartition('.')[2]}={value}" for key, value in own[:_TOLD]]
            groups.append(Group(" · ".join([label, *told]), tuple(members)))
    return groups


def table(groups: Sequence[Group]) -> list[Row]:
    """The comparison, best value per column marked.

    The joint upper bound and unfinished runs don't compete for the mark; it is given only where at
    least two do. What can't be told apart from the best has the mark too, and where that is so of all of them
    none has.
    """
    rows = []
    rivals = [g for g in groups if g.finished and not g.joint]
    marked = {column.key: _best(rivals, column) for column in COLUMNS}
    for index, group in enumerate(groups):
        cells = []
        for column in COLUMNS:
            mean = group.mean(column.key)
            best = group in marked[column.key]
            values = group.values(column.key)
            spread = (
                f"± {number(statistics.stdev(values))}" if len(values) > 1 and column.key != "seconds" else ""
            )
            cells.append(Cell(_print(column, mean), spread, best, mean))
        many = len(group.runs) > 1
        note = f"mean of {len(group.runs)} runs" if many else _progress(group.runs[0])
        rows.append(Row(group.label, index, tuple(cells), group.finished, tags=group.tags, note=note))
        for run in group.runs if many else ():
            alone = tuple(Cell(_print(column, value_of(run, column.key))) for column in COLUMNS)
            name = run.name.removeprefix(f"{run.metrics.label} · ")
            rows.append(Row(name, index, alone, run.metrics.finished, True, note=_progress(run)))
    return rows


def apart(group: Group, other: Group, key: str) -> Difference | None:
    """The difference of a column, paired by seed, with its interval; None where seeds make no two pairs."""
    one, two = ({run.metrics.seed: value_of(run, key) for run in g.runs} for g in (group, other))
    found = difference(one, two)
    return None if found.low is None else found


def _best(rivals: Sequence[Group], column: Column) -> list[Group]:
    measured = [(mean, group) for group in rivals if (mean := group.mean(column.key)) is not None]
    if len({mean for mean, _ in measured}) < 2:
        return []
    top = (max if column.higher_is_better else min)(mean for mean, _ in measured)
    first = next(group for mean, group in measured if mean == top)
    best = []
    for mean, group in measured:
        gap = None if group is first else apart(first, group, column.key)
        even = gap is not None and gap.holds_zero
        if even or _print(column, mean) == _print(column, top):
            best.append(group)
    return best if len(best) < len(measured) else []


def _print(column: Column, value: float | None) -> str:
    return duration(value) if column.key == "seconds" else number(value)


def _progress(run: RunRecord) -> str:
    return "" if run.metrics.finished else f"unfinished: {run.seen} of {len(run.metrics.tasks)} tasks"
