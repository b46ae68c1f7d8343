"""What a sweep's rows choose on validation rows, and the order of cells that follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.sweep.cells import Outcome
from holdfast.sweep.grid import Cell, GridRow, Line, Plan


@dataclass(frozen=True)
class Choice:
    """The point that a row is tested at (None: all of them failed), and each point's validation score."""

    line: Line | None
    values: tuple[tuple[Line, float | None], ...]


def choose(plan: Plan, outcomes: Mapping[Path, Outcome]) -> dict[str, Choice]:
    """Pick the grid point with the highest mean on validation rows; of equals, the first.

    A point of which a run failed can't be picked; a row without any other has no line.

    Returns
    -------
    dict
        Row to choice, for each row whose candidates have all ended.
    """
    if plan.grid.choose is None:
        return {}
    by = plan.grid.choose.by
    choices: dict[str, Choice] = {}
    for row in plan.grid.rows:
        candidates = _of(plan.candidates, row)
        if not candidates or any(not outcomes[c.folder].ended for c in candidates):
            continue
        values: list[tuple[Line, float | None]] = []
        for line in row.lines():
            scores = [getattr(outcomes[c.folder].metrics, by, None) for c in candidates if c.line == line]
            known = [score for score in scores if score is not None]
            values.append((line, statistics.fmean(known) if len(known) == len(scores) else None))
        best = max((value for _, value in values if value is not None), default=None)
        chosen = next((line for line, value in values if best is not None and value == best), None)
        choices[row.name] = Choice(chosen, tuple(values))
    return choices


def tested(row: GridRow, plan: Plan, choices: Mapping[str, Choice]) -> list[Line]:
    """Give the lines of a row that run on the test rows: where it chooses, none before it has chosen."""
    if row.name in choices:
        return [line for line in row.lines() if line == choices[row.name].line]
    return [] if _of(plan.candidates, row) else row.lines()


def in_order(plan: Plan, choices: Mapping[str, Choice]) -> Iterator[Cell]:
    """Give every cell known so far, row by row: a sweep that is stopped early has whole rows."""
    for row in plan.grid.rows:
        lines = tested(row, plan, choices)
        yield from _of(plan.candidates, row)
        yield from (cell for cell in _of(plan.cells, row) if cell.line in lines)


def count(plan: Plan, choices: Mapping[str, Choice]) -> int:
    """How many cells there will be: a row that has yet to choose will run one of its points."""
    undecided = [r for r in plan.grid.rows if r.name not in choices and _of(plan.candidates, r)]
    to_come = sum(len(_of(plan.cells, row)) // len(row.lines()) for row in undecided)
    return to_come + sum(1 for _ in in_order(plan, choices))


def _of(cells: tuple[Cell, ...], row: GridRow) -> list[Cell]:
    return [cell for cell in cells if cell.line.row == row.name]
