"""What a sweep's rows choose on validation rows, and the order of cells that follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.runner.compare_cells import Outcome
from holdfast.runner.compare_config import Cell, GridRow, Line, Plan


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
        for line in _lines(row):
            scores = [outcomes[c.folder].metrics.get(by) for c in candidates if c.line == line]
            known = [score for score in scores if score is not None]
            values.append((line, statistics.fmean(known) if len(known) == len(scores) else None))
        best = max((value for _, value in values if value is not None), default=None)
        chosen = next((line for line, value in values if best is not None and value == best), None)
        choices[row.name] = Choice(chosen, tuple(values))
    return choices


def is_tested(line: Line, plan: Plan, choices: Mapping[str, Choice]) -> bool:
    """Whether a line runs on the test rows: of a row that chooses, no point does until it has chosen."""
    if line.row in choices:
        return choices[line.row].line == line
    return not any(cell.line.row == line.row for cell in plan.candidates)


def in_order(plan: Plan, choices: Mapping[str, Choice]) -> Iterator[Cell]:
    """Give every cell known so far, row by row: a sweep that is stopped early has whole rows."""
    for row in plan.grid.rows:
        yield from _of(plan.candidates, row)
        yield from (cell for cell in _of(plan.cells, row) if is_tested(cell.line, plan, choices))


def count(plan: Plan, choices: Mapping[str, Choice]) -> int:
    """How many cells there will be: a row that has yet to choose will run one of its points."""
    undecided = [r for r in plan.grid.rows if r.name not in choices and _of(plan.candidates, r)]
    return len(list(in_order(plan, choices))) + sum(
        len(_of(plan.cells, row)) // len(_lines(row)) for row in undecided
    )


def _lines(row: GridRow) -> list[Line]:
    return [Line(row.name, point) for point in row.points()]


def _of(cells: tuple[Cell, ...], row: GridRow) -> list[Cell]:
    return [cell for cell in cells if cell.line.row == row.name]
