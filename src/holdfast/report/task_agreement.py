"""Reads the priors of several tasks together: how far they agree, layer by layer (A, figure 1)."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from holdfast.importance.agreement import pairwise_by_block
from holdfast.importance.moments import shape_of
from holdfast.importance.prior import Kind
from holdfast.importance.stored import Unpacking
from holdfast.names import Block
from holdfast.report.importance_map import kind_of, open_prior
from holdfast.report.read import AttributionRecord
from holdfast.report.summary import Group

SAMPLE = 2**15  # of a larger tensor; on real priors the curves move by less than 0.01
KINDS = {  # where the priors come from: a word for the legend, and what it means
    "single_task": ("single-task", "each task rated on a model trained on it alone"),
    "sequential": ("sequential", "one model learns all tasks, and each is rated right after it was learned"),
    "": ("", ""),
    "one_model": ("final model", "all tasks rated on one and the same model"),
}

Pair = tuple[str, str]


@dataclass(frozen=True)
class TaskAgreement:
    """Priors of one run, or several attributions of one model, compared pair by pair.

    Attributes
    ----------
    label : str
    group : int or None
        Index of the method, for its colour; None for attributions.
    kind : str
        A key of `KINDS`: on which models the priors were computed.
    tables : dict of Pair to dict of Block to (float, float)
        Overlap and correlation of two tasks by block, averaged over seeds.
    """

    label: str
    group: int | None
    kind: str
    tables: dict[Pair, dict[Block, tuple[float, float]]]


def task_agreements(
    groups: Sequence[Group], attributions: Sequence[AttributionRecord]
) -> list[TaskAgreement]:
    """What can be compared: each method, apart for each kind of prior; attributions that share a model."""
    found = []
    for g, group in enumerate(groups):
        for kind in KINDS:
            runs = [
                [(stage.task, stage.prior) for stage in run.stages if stage.prior]
                for run in group.runs
                if run.prior_from == kind
            ]
            tables = _mean([_compared(priors) for priors in runs if len(priors) > 1])
            if tables:
                found.append(TaskAgreement(group.label, g, kind, tables))
    models: dict[tuple[str, str], dict[str, Path]] = {}
    for record in attributions:
        if record.prior and record.meta and record.meta.model_digest:
            source = record.meta.model_digest, record.meta.importance
            name = ", ".join(record.meta.tasks) or record.name
            models.setdefault(source, {})[name] = record.prior
    for (_, importance), priors_of in models.items():
        if len(priors_of) > 1:
            label = f"{importance} of {len(priors_of)} tasks"
            found.append(TaskAgreement(label, None, "one_model", _compared(list(priors_of.items()))))
    return [agreement for agreement in found if any(agreement.tables.values())]


def _compared(priors: Sequence[tuple[str, Path]]) -> dict[Pair, dict[Block, tuple[float, float]]]:
    """All pairs of tasks, over the weights that all the priors cover; one tensor a prior is in memory."""
    kinds: set[Kind] = {kind_of(path) for _, path in priors}
    if len(kinds) > 1:
        return {}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_prior(path)) for _, path in priors]
        kind = kinds.pop()
        tables = pairwise_by_block(_shared(opened, kind), kind, sample=SAMPLE)
    return {
        (priors[i][0], priors[j][0]): {
            block: (overlap_TT[i, j].item(), correlation_TT[i, j].item())
            for block, (overlap_TT, correlation_TT) in tables.items()
        }
        for i, j in itertools.combinations(range(len(priors)), 2)
    }


def _shared(opened: Sequence[Unpacking], kind: Kind) -> Iterator[tuple[str, list[Tensor]]]:
    names = set.intersection(*(set(tensors.keys()) for tensors in opened))
    for name in sorted(names):
        values = [tensors.get_tensor(name) for tensors in opened]
        if len({shape_of(v) if kind == "inputs" else v.shape for v in values}) == 1:
            yield name, values


def _mean(
    tables: Sequence[dict[Pair, dict[Block, tuple[float, float]]]],
) -> dict[Pair, dict[Block, tuple[float, float]]]:
    """Mean over seeds; the orders of two tasks are one pair."""
    values: dict[Pair, dict[Block, list[tuple[float, float]]]] = {}
    for table in tables:
        for (a, b), blocks in table.items():
            pair = (b, a) if (b, a) in values else (a, b)
            for block, both in blocks.items():
                values.setdefault(pair, {}).setdefault(block, []).append(both)
    return {
        pair: {block: (_average([o for o, _ in both]), _average([r for _, r in both]))
               for block, both in blocks.items()}
        for pair, blocks in values.items()
    }  # fmt: skip


def _average(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
