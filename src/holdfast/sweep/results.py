"""What a sweep found: the contents of ``compare.json``, and the same as Markdown."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from holdfast.evaluation.compare import METRICS, curves, difference, mean_and_spread
from holdfast.quantities import MISSING, interval, number, spread
from holdfast.records import (
    Candidate,
    Choices,
    ChosenRow,
    ComparedRun,
    Comparison,
    ComparisonCurve,
    ComparisonRow,
    FailedCell,
)
from holdfast.runner.config import RunConfig
from holdfast.sweep.cells import Outcome
from holdfast.sweep.choice import Choice, tested
from holdfast.sweep.grid import Cell, Line, Plan

SHOWN = (("ap", "AP"), ("bwt", "BWT"), ("learning_accuracy", "learning accuracy"))


def collect(plan: Plan, outcomes: Mapping[Path, Outcome], choices: Mapping[str, Choice]) -> Comparison:
    """The contents of ``compare.json`` as far as the sweep got."""
    grid = plan.grid
    chosen = [line for row in grid.rows for line in tested(row, plan, choices)]
    scores = {line.label: _scores(_of(plan.cells, line), outcomes) for line in chosen}
    reference = next((line.label for line in chosen if plan.reference in (line.row, line.label)), None)
    run = [*plan.candidates, *(cell for cell in plan.cells if cell.line in chosen)]
    failed = [cell for cell in run if outcomes[cell.folder].status == "failed"]
    return Comparison(
        grid=plan.source,
        metrics=list(METRICS),
        seeds=list(grid.seeds),
        orders={
            name: order if isinstance(order, str) else list(order)
            for name, order in zip(_names(plan), grid.orders or (), strict=False)
        },
        reference=reference,
        finished=not failed and all(outcomes[cell.folder].status == "finished" for cell in run),
        rows=[_row(line, plan, outcomes, scores, reference) for line in chosen],
        choice=_choice(plan, choices),
        curves=_curves(plan, outcomes),
        failed=[
            FailedCell(cell=cell.name, path=_relative(cell, plan), reason=outcomes[cell.folder].reason)
            for cell in failed
        ],
        without_point=[row for row, choice in choices.items() if choice.line is None],
    )


def _of(cells: Sequence[Cell], line: Line) -> list[Cell]:
    return [cell for cell in cells if cell.line == line]


def _names(plan: Plan) -> list[str]:
    return list(dict.fromkeys(cell.order for cell in plan.cells if cell.order))


def _relative(cell: Cell, plan: Plan) -> str:
    return Path(os.path.relpath(cell.folder, plan.grid.output)).as_posix()


Scores = Mapping[str, Mapping[tuple[int, str], float | None]]  # metric to (seed, order) to value


def _scores(cells: Sequence[Cell], outcomes: Mapping[Path, Outcome]) -> Scores:
    """Of the cells that are finished."""
    done = {(c.seed, c.order): m for c in cells if (m := outcomes[c.folder].metrics) is not None}
    return {key: {pair: getattr(metrics, key) for pair, metrics in done.items()} for key in METRICS}


def _row(
    line: Line,
    plan: Plan,
    outcomes: Mapping[Path, Outcome],
    scores: Mapping[str, Scores],
    reference: str | None,
) -> ComparisonRow:
    cells, mine = _of(plan.cells, line), scores[line.label]
    theirs = None if reference in (None, line.label) else scores[reference or ""]
    found = {cell.folder: outcomes[cell.folder] for cell in cells}
    seconds = [o.metrics.seconds["total"] for o in found.values() if o.metrics is not None]
    return ComparisonRow(
        row=line.row,
        label=line.label,
        point=dict(line.point),
        strategy=cells[0].config.strategy.name,
        command=cells[0].command,
        scores={key: mean_and_spread(list(mine[key].values())) for key in METRICS},
        differences=None if theirs is None else {k: difference(mine[k], theirs[k]) for k in METRICS},
        seconds=statistics.fmean(seconds) if seconds else None,
        runs=[
            ComparedRun(
                seed=cell.seed,
                order=cell.order,
                path=_relative(cell, plan),
                status=found[cell.folder].status,
                ap=getattr(found[cell.folder].metrics, "ap", None),
            )
            for cell in cells
        ],
    )


def _choice(plan: Plan, choices: Mapping[str, Choice]) -> Choices | None:
    choose = plan.grid.choose
    if choose is None:
        return None
    return Choices(
        on=choose.on,
        by=choose.by,
        seeds=list(choose.seeds or plan.grid.seeds[:1]),
        rows=[
            ChosenRow(
                row=row,
                chosen=choice.line.label if choice.line else None,
                candidates=[Candidate(label=line.label, value=value) for line, value in choice.values],
            )
            for row, choice in choices.items()
        ],
    )


def _curves(plan: Plan, outcomes: Mapping[Path, Outcome]) -> list[ComparisonCurve]:
    """AP against learning accuracy over each row's strength: of its candidates, if it has any."""
    found = []
    for row in plan.grid.rows:
        cells = [cell for cell in plan.candidates if cell.line.row == row.name]
        split: Literal["test", "validation"] = "validation" if cells else "test"
        cells = cells or [cell for cell in plan.cells if cell.line.row == row.name]
        points = []
        for line in row.lines():
            mine = _of(cells, line)
            scores = _scores(mine, outcomes)
            means = {k: mean_and_spread(list(scores[k].values())).mean for k in METRICS}
            points.append((_taken(line.point, mine[0].config), means))
        for curve in curves({key: [point[key] for point, _ in points] for key in row.grid}, points):
            found.append(ComparisonCurve(row=row.name, split=split, **dict(curve)))
    return found


def _taken(point: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A grid's point with numbers where it has texts (``"5"``) that the configuration took as numbers."""
    taken = dict(point)
    for key in (key for key, value in point.items() if isinstance(value, str)):
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else getattr(node, part, None)
        if isinstance(node, int | float):
            taken[key] = node
    return taken


def markdown(results: Comparison) -> str:
    """The table of a sweep, with each row's command, as Markdown."""
    heads = ["", *(name for _, name in SHOWN)]
    heads += [f"Δ {name}" for _, name in SHOWN] if results.reference else []
    heads += ["runs", "command"]
    lines = [f"# Comparison: {_plain(Path(results.grid).name)}", "", *_about(results), ""]
    lines += [_line(heads), _line(["---", *["---:"] * (len(heads) - 2), "---"])]
    for row in results.rows:
        done = sum(run.status == "finished" for run in row.runs)
        cells = [_plain(row.label), *(shown_score(row, key) for key, _ in SHOWN)]
        if results.reference:
            cells += [shown_difference(row, key) for key, _ in SHOWN]
        lines.append(_line([*cells, f"{done}/{len(row.runs)}", _code(row.command)]))
    choice = results.choice
    if choice is not None and choice.rows:
        seeds = ", ".join(map(str, choice.seeds))
        lines += ["", f"## Chosen on validation rows by {choice.by} (seed {seeds})", ""]
        lines += [_line(["candidate", choice.by, ""]), _line(["---", "---:", "---"])]
        for chosen in choice.rows:
            for candidate in chosen.candidates:
                mark = "chosen" if candidate.label == chosen.chosen else ""
                lines.append(_line([_plain(candidate.label), number(candidate.value), mark]))
    if results.failed or results.without_point:
        lines += ["", "## Failed", ""]
        lines += [f"* {_plain(item.cell)}: {_plain(item.reason)}" for item in results.failed]
        lines += [f"* {_plain(name)}: no grid point could be chosen" for name in results.without_point]
    return "\n".join(lines) + "\n"


def table(results: Comparison, *, plain: bool = False) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a sweep's table, without the commands.

    Parameters
    ----------
    plain : bool
        Mean, standard deviation and the ends of the interval in columns of their own, to six digits.
    """
    if not plain:
        heads = ["row", *(name for _, name in SHOWN)]
        heads += [f"Δ {name}" for _, name in SHOWN] if results.reference else []
        shown = [[row.label, *(shown_score(row, key) for key, _ in SHOWN)] for row in results.rows]
        if results.reference:
            for cells, row in zip(shown, results.rows, strict=True):
                cells += [shown_difference(row, key) for key, _ in SHOWN]
        return heads, shown
    heads = ["row", "strategy", "runs"]
    parts = {"scores": ("mean", "sd")} | (
        {"differences": ("mean", "low", "high")} if results.reference else {}
    )
    for kind, names in parts.items():
        heads += [f"{'delta_' if kind == 'differences' else ''}{key}_{n}" for key in METRICS for n in names]
    rows = []
    for row in results.rows:
        cells = [row.label, row.strategy, str(sum(run.status == "finished" for run in row.runs))]
        for kind, names in parts.items():
            found = getattr(row, kind) or {}
            for key in METRICS:
                values = [getattr(found.get(key), name, None) for name in names]
                cells += ["" if value is None else f"{value:.6g}" for value in values]
        rows.append(cells)
    return heads, rows


def _about(results: Comparison) -> list[str]:
    seeds = ", ".join(map(str, results.seeds))
    orders = "; ".join(
        _plain(f"{name}: {order if isinstance(order, str) else ' → '.join(order)}")
        for name, order in results.orders.items()
    )
    over = f"seeds {seeds}{f' and orders ({orders})' if orders else ''}"
    about = [f"Percent, mean ± standard deviation over {over}."]
    if results.reference:
        about.append(
            f"Δ: mean difference from **{_plain(results.reference)}** with the same seed and order, and its "
            "95 % bootstrap interval (percentile, 10,000 resamples)."
        )
    if not results.finished:
        about.append("**The sweep is not complete**: run the same command again.")
    return about


def shown_score(row: ComparisonRow, key: str) -> str:
    """A metric of a line, such as "43.1 ± 2.0"."""
    return spread(row.scores[key].mean, row.scores[key].sd)


def shown_difference(row: ComparisonRow, key: str) -> str:
    """A metric's difference from the reference, such as "+3.2 [+1.0, +5.1]"; a dash where there is none."""
    found = (row.differences or {}).get(key)
    return MISSING if found is None else interval(found.mean, found.low, found.high)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """A text with nothing in it that Markdown would read as its own, within a line."""
    escaped = re.sub(r"[\\`*<>\[\]|~&]|\b_|_\b", r"\\\g<0>", text)  # snake_case is nothing to it
    return " ".join(escaped.split())


def _code(text: str) -> str:
    """A command as code, with a fence longer than any run of backticks in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if len(fence) > 1 else ""
    return f"{fence}{blank}{text}{blank}{fence}".replace("|", "\\|")
