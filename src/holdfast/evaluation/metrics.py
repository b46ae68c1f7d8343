"""Continual-learning metrics: pure functions of the matrix ``a[j][i]`` (K, eqs. 18-20).

``matrix[j][i]`` is the score (0 to 100) on task i after j tasks were learned; row 0 is the zero-shot
score before any training, so a stream of T tasks has T + 1 rows. None means "not measured"; a metric
that needs such an entry is None.
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None]]


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(v is None for v in values):
        return None
    return sum(v for v in values if v is not None) / len(values)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def average_performance(matrix: Matrix) -> float | None:
    """AP (K, eq. 18): mean over all tasks after the last one was learned."""
    return _mean(matrix[-1])


def forward_transfer(matrix: Matrix) -> float | None:
    """FWT (K, eq. 19): mean score on each task (from the second on) just before it is learned."""
    tasks = len(matrix[0])
    return _mean([matrix[i][i] for i in range(1, tasks)])


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT (K, eq. 20): mean change of each earlier task from when it was learned to the end.

    Below 0 is forgetting.
    """
    tasks = len(matrix[0])
    return _mean([_difference(matrix[-1][i], matrix[i + 1][i]) for i in range(tasks - 1)])


def learning_accuracy(matrix: Matrix) -> float | None:
    """Mean score on each task right after it was learned: the diagonal."""
    return _mean([matrix[i + 1][i] for i in range(len(matrix[0]))])


def forgetting(matrix: Matrix) -> float | None:
    """Mean drop of each earlier task from its best score before the last stage to the end.

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 3: negative where a task ends above all it had before.
    """
    tasks = len(matrix[0])
    drops: list[float | None] = []
    for i in range(tasks - 1):
        column = [row[i] for row in matrix[i + 1 : -1]]
        if matrix[-1][i] is None or any(v is None for v in column):
            return None
        best = max(v for v in column if v is not None)
        drops.append(_difference(best, matrix[-1][i]))
    return _mean(drops)


def summarise(matrix: Matrix) -> dict[str, float | None]:
    """All metrics under the names of ``metrics.json``."""
    return {
        "ap": average_performance(matrix),
        "fwt": forward_transfer(matrix),
        "bwt": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "learning_accuracy": learning_accuracy(matrix),
    }
