"""What a sweep found: the contents of ``compare.json``, and the same as Markdown."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.evaluation.compare import METRICS, curves, difference, mean_and_spread
from holdfast.sweep.cells import Outcome
from holdfast.sweep.choice import Choice, tested
from holdfast.sweep.grid import Cell, Line, Plan

SHOWN = (("ap", "AP"), ("bwt", "BWT"), ("learning_accuracy", "learning accuracy"))
Json = dict[str, Any]


def collect(plan: Plan, outcomes: Mapping[Path, Outcome], choices: Mapping[str, Choice]) -> Json:
    """The contents of ``compare.json`` as far as the sweep got."""
    grid = plan.grid
    chosen = [line for row in grid.rows for line in tested(row, plan, choices)]
    scores = {line.label: _scores(_of(plan.cells, line), outcomes) for line in chosen}
    reference = next((line.label for line in chosen if plan.reference in (line.row, line.label)), None)
    run = [*plan.candidates, *(cell for cell in plan.cells if cell.line in chosen)]
    failed = [cell for cell in run if outcomes[cell.folder].status == "failed"]
    lost = [row for row, choice in choices.items() if choice.line is None]
    return {
        "grid": plan.source,
        "metrics": list(METRICS),
        "seeds": list(grid.seeds),
        "orders": {
            name: order if isinstance(order, str) else list(order)
            for name, order in zip(_names(plan), grid.orders or (), strict=False)
        },
        "reference": reference,
        "finished": not failed and all(outcomes[cell.folder].status == "finished" for cell in run),
        "rows": [_row(line, plan, outcomes, scores, reference) for line in chosen],
        "choice": _choice(plan, choices),
        "curves": _curves(plan, outcomes),
        "failed": [
            {"cell": cell.name, "path": _relative(cell, plan), "reason": outcomes[cell.folder].reason}
            for cell in failed
        ],
        "without_point": lost,
    }


def _of(cells: Sequence[Cell], line: Line) -> list[Cell]:
    return [cell for cell in cells if cell.line == line]


def _names(plan: Plan) -> list[str]:
    return list(dict.fromkeys(cell.order for cell in plan.cells if cell.order))


def _relative(cell: Cell, plan: Plan) -> str:
    return Path(os.path.relpath(cell.folder, plan.grid.output)).as_posix()


def _scores(cells: Sequence[Cell], outcomes: Mapping[Path, Outcome]) -> dict[str, dict[Any, float | None]]:
    """Metric to (seed, order) to value, of the cells that are finished."""
    done = {(c.seed, c.order): outcomes[c.folder].metrics for c in cells if outcomes[c.folder].metrics}
    return {key: {pair: metrics.get(key) for pair, metrics in done.items()} for key in METRICS}


def _row(
    line: Line, plan: Plan, outcomes: Mapping[Path, Outcome], scores: Mapping[str, Any], reference: str | None
) -> Json:
    cells, mine = _of(plan.cells, line), scores[line.label]
    theirs = None if reference in (None, line.label) else scores[reference or ""]
    seconds = [o.metrics["seconds"]["total"] for c in cells if (o := outcomes[c.folder]).metrics]
    return {
        "row": line.row,
        "label": line.label,
        "point": dict(line.point),
        "strategy": cells[0].config.strategy.name,
        "command": cells[0].command,
        "scores": {key: mean_and_spread(list(mine[key].values())) for key in METRICS},
        "differences": {key: difference(mine[key], theirs[key]) for key in METRICS} if theirs else None,
        "seconds": statistics.fmean(seconds) if seconds else None,
        "runs": [
            {
                "seed": cell.seed,
                "order": cell.order,
                "path": _relative(cell, plan),
                "status": outcomes[cell.folder].status,
                "ap": outcomes[cell.folder].metrics.get("ap"),
            }
            for cell in cells
        ],
    }


def _choice(plan: Plan, choices: Mapping[str, Choice]) -> Json | None:
    choose = plan.grid.choose
    if choose is None:
        return None
    return {
        "on": choose.on,
        "by": choose.by,
        "seeds": list(choose.seeds or plan.grid.seeds[:1]),
        "rows": [
            {
                "row": row,
                "chosen": choice.line.label if choice.line else None,
                "candidates": [{"label": line.label, "value": value} for line, value in choice.values],
            }
            for row, choice in choices.items()
        ],
    }


def _curves(plan: Plan, outcomes: Mapping[Path, Outcome]) -> list[Json]:
    """AP against learning accuracy over each row's strength: of its candidates, if it has any."""
    found = []
    for row in plan.grid.rows:
        cells = [cell for cell in plan.candidates if cell.line.row == row.name]
        split = "validation" if cells else "test"
        cells = cells or [cell for cell in plan.cells if cell.line.row == row.name]
        points = []
        for line in row.lines():
            scores = _scores(_of(cells, line), outcomes)
            means = {key: mean_and_spread(list(scores[key].values()))["mean"] for key in METRICS}
            points.append((line.point, means))
        found += [{"row": row.name, "split": split, **curve} for curve in curves(row.grid, points)]
    return found


def markdown(results: Json) -> str:
    """The table of a sweep, with each row's command, as Markdown."""
    reference = results["reference"]
    heads = ["", *(name for _, name in SHOWN)]
    heads += [f"Δ {name}" for _, name in SHOWN] if reference else []
    heads += ["runs", "command"]
    lines = [f"# Comparison: {Path(results['grid']).name}", "", *_about(results), ""]
    lines += [_line(heads), _line(["---", *["---:"] * (len(heads) - 2), "---"])]
    for row in results["rows"]:
        done = sum(run["status"] == "finished" for run in row["runs"])
        cells = [row["label"], *(spread(row["scores"][key]) for key, _ in SHOWN)]
        if reference:
            cells += [interval((row["differences"] or {}).get(key)) for key, _ in SHOWN]
        lines.append(_line([*cells, f"{done}/{len(row['runs'])}", f"`{row['command']}`"]))
    choice = results["choice"]
    if choice is not None and choice["rows"]:
        seeds = ", ".join(map(str, choice["seeds"]))
        lines += ["", f"## Chosen on validation rows by {choice['by']} (seed {seeds})", ""]
        lines += [_line(["candidate", choice["by"], ""]), _line(["---", "---:", "---"])]
        for row in choice["rows"]:
            for candidate in row["candidates"]:
                mark = "chosen" if candidate["label"] == row["chosen"] else ""
                lines.append(_line([candidate["label"], number(candidate["value"]), mark]))
    if results["failed"] or results["without_point"]:
        lines += ["", "## Failed", ""]
        lines += [f"* {item['cell']}: {item['reason']}" for item in results["failed"]]
        lines += [f"* {row}: no grid point could be chosen" for row in results["without_point"]]
    return "\n".join(lines) + "\n"


def _about(results: Json) -> list[str]:
    seeds = ", ".join(map(str, results["seeds"]))
    orders = "; ".join(
        f"{name}: {order if isinstance(order, str) else ' → '.join(order)}"
        for name, order in results["orders"].items()
    )
    over = f"seeds {seeds}{f' and orders ({orders})' if orders else ''}"
    about = [f"Percent, mean ± standard deviation over {over}."]
    if results["reference"]:
        about.append(
            f"Δ: mean difference from **{results['reference']}** with the same seed and order, and its 95 % "
            "bootstrap interval (percentile, 10,000 resamples)."
        )
    if not results["finished"]:
        about.append("**The sweep is not complete**: run the same command again.")
    return about


def number(value: float | None, sign: bool = False) -> str:
    """One decimal with a real minus sign; a dash where nothing was measured."""
    if value is None:
        return "–"
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    if float(text) == 0:
        text = "0.0"
    return text.replace("-", "−")


def spread(score: Json) -> str:
    """A mean with its standard deviation, such as ``43.1 ± 2.0``."""
    return number(score["mean"]) + ("" if score["sd"] is None else f" ± {number(score['sd'])}")


def interval(difference: Json | None) -> str:
    """A mean difference with its interval, such as ``+3.2 [+1.0, +5.1]``."""
    if difference is None or difference["mean"] is None:
        return "–"
    mean = number(difference["mean"], sign=True)
    if difference["low"] is None:
        return mean
    return f"{mean} [{number(difference['low'], sign=True)}, {number(difference['high'], sign=True)}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
