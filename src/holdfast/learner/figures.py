"""What the loggers of a training are told after a task: scores, AP, BWT, and KL to the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.evaluation.metrics import summarise
from holdfast.records import StageMetrics


def matrix_of(names: Sequence[str], scores: Sequence[Mapping[str, float | None]]) -> list[list[float | None]]:
    """``a[j][i]``: the score of task i after j tasks; row 0, before any, is empty."""
    return [[None] * len(names), *([row.get(name) for name in names] for row in scores)]


def figures_after(parts: Sequence[Path], now: StageMetrics, same_as: Mapping[str, str]) -> dict[str, float]:
    """Figures of the tasks learned so far, as far as they are known.

    Parameters
    ----------
    parts : sequence of Path
        Of the stages before, in order.
    now : StageMetrics
        Of the stage that was measured last.
    same_as : mapping
        Name of a task that came before to the name that it had the first time.

    Returns
    -------
    dict
        ``eval_score/<task>``, ``eval_ap``, ``eval_bwt``, ``eval_learning_accuracy``, ``eval_kl_base`` and
        ``eval_kl_new``, without what was not measured; and ``eval_tasks_learned``, the axis to draw the
        others over, since each training counts its steps from 0.
    """
    records = [*(StageMetrics.read(part / "metrics.json") for part in parts), now]
    names = [record.stage for record in records]
    tasks = [same_as.get(r.stage, r.stage) if r.stage in r.scores else None for r in records]
    found = summarise(matrix_of(names, [record.scores for record in records]), tasks)
    figures = {f"eval_score/{task}": score for task, score in now.scores.items()}
    figures |= {f"eval_{key}": found[key] for key in ("ap", "bwt", "learning_accuracy")}
    figures |= {"eval_kl_base": now.kl_base, "eval_kl_new": now.kl_new, "eval_tasks_learned": len(records)}
    return {name: value for name, value in figures.items() if value is not None}
