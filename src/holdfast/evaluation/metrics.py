"""Continual-learning metrics: pure functions of the matrix ``a[j][i]`` (K, eqs. 18-20).

``matrix[j][i]`` is the score (0 to 100) on task i after j tasks were learned; row 0 is the zero-shot
score before any training, so a stream of T tasks has T + 1 rows. None means "not measured"; a metric
that needs such an entry is None.

The equations are of tasks that differ. Where a task comes into a stream again, `tasks` says which columns
are one task: it counts once, since it was last learned, and in FWT before it was first learned. Counted at
each of its places, what it gained by being learned again would hide what others lost. A task that no row
tests (None in `tasks`) counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None]]
Tasks = Sequence[str | None] | None


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(v is None for v in values):
        return None
    return sum(v for v in values if v is not None) / len(values)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _places(matrix: Matrix, tasks: Tasks, *, last: bool = True) -> list[int]:
    """One column of each task: of its last time in the stream, or of its first."""
    names = range(len(matrix[0])) if tasks is None else tasks
    found: dict[object, int] = {}
    for i, name in enumerate(names):
        if name is not None and (last or name not in found):
            found[name] = i
    return sorted(found.values())


def _earlier(matrix: Matrix, tasks: Tasks) -> list[int]:
    """One column of each task but the one that was learned last."""
    return [i for i in _places(matrix, tasks) if i < len(matrix[0]) - 1]


def average_performance(matrix: Matrix, tasks: Tasks = None) -> float | None:
    """AP (K, eq. 18): mean over all tasks after the last one was learned."""
    return _mean([matrix[-1][i] for i in _places(matrix, tasks)])


def forward_transfer(matrix: Matrix, tasks: Tasks = None) -> float | None:
    """FWT (K, eq. 19): mean score on each task (from the second on) just before it is first learned."""
    return _mean([matrix[i][i] for i in _places(matrix, tasks, last=False) if i > 0])


def backward_transfer(matrix: Matrix, tasks: Tasks = None) -> float | None:
    """BWT (K, eq. 20): mean change of each earlier task from when it was learned to the end.

    Below 0 is forgetting.
    """
    return _mean([_difference(matrix[-1][i], matrix[i + 1][i]) for i in _earlier(matrix, tasks)])


def learning_accuracy(matrix: Matrix, tasks: Tasks = None) -> float | None:
    """Mean score on each task right after it was learned: the diagonal."""
    return _mean([matrix[i + 1][i] for i in _places(matrix, tasks)])


def forgetting(matrix: Matrix, tasks: Tasks = None) -> float | None:
    """Mean drop of each earlier task from its best score before the last stage to the end.

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 3: negative where a task ends above all it had before.
    """
    drops: list[float | None] = []
    for i in _earlier(matrix, tasks):
        column = [row[i] for row in matrix[i + 1 : -1]]
        if matrix[-1][i] is None or any(v is None for v in column):
            return None
        best = max(v for v in column if v is not None)
        drops.append(_difference(best, matrix[-1][i]))
    return _mean(drops)


def summarise(matrix: Matrix, tasks: Tasks = None) -> dict[str, float | None]:
    """All metrics under the names of ``metrics.json``.

    Parameters
    ----------
    tasks : sequence, optional
        Which task each column is of, None where no row tests it; by default all differ.
    """
    return {
        "ap": average_performance(matrix, tasks),
        "fwt": forward_transfer(matrix, tasks),
        "bwt": backward_transfer(matrix, tasks),
        "forgetting": forgetting(matrix, tasks),
        "learning_accuracy": learning_accuracy(matrix, tasks),
    }
