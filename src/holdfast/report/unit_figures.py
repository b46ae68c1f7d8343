"""The heat map of skill units across tasks and layers (K, figures 6 and 7)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from holdfast.importance.skill_units import normalised
from holdfast.report.figures import HEAT, Json, finish, frame, line_count, text
from holdfast.report.importance_map import ImportanceMap, block_labels
from holdfast.report.panels import Panel
from holdfast.report.summary import Group
from holdfast.report.units import Rows, Unit, UnitTable, unit_table
from holdfast.report.weight_figures import short_modules

_UNIT, _LAYER = 3, 26  # px that a column and a layer's label need at least; below that the figure scrolls
_NUMBERED = re.compile(r"^layer\.\d+\.")
_LONGEST = 16  # characters of a line of a task's name
_LABELS = 24  # px above the cells for the layers' numbers
_NAMED = 12  # modules that a note names
_SHADES = [  # most scores are small: theirs are the finer steps
    [(i / (len(HEAT) - 1)) ** 2, shade] for i, (_, shade) in enumerate(HEAT)
]


def unit_panels(
    figures: dict[str, Json], groups: Sequence[Group], map_of: Callable[[Path], ImportanceMap]
) -> tuple[list[Panel], bool]:
    """One panel a method, with a selector of seeds and kinds of score; and whether all scored units."""
    panels, measured = [], True
    for g, group in enumerate(groups):
        prefix, choices, width, note = f"units-{g}-", [], 0, ""
        for n, run in enumerate(group.runs):
            table = unit_table(run, map_of)
            if table is None:
                continue
            measured &= table.measured
            seed = run.name.removeprefix(f"{group.label} · ") if len(group.runs) > 1 else ""
            kinds = [("s", "for each task alone", table.scores)]
            if table.accumulated is not None:
                kinds.append(("a", "accumulated up to each task", table.accumulated))
            for kind, name, rows in kinds:
                figures[f"{prefix}{n}{kind}"] = unit_map(table, rows)
                shown = [seed, name if len(kinds) > 1 else ""]
                choices.append((f"{n}{kind}", ", ".join(filter(None, shown))))
            width, note = max(width, _least_width(table)), note or order_note(table)
        if choices:
            panels.append(Panel(prefix + choices[0][0], group.label, width, note, g, prefix, choices))
    return panels, measured


def unit_map(table: UnitTable, rows: Rows) -> Json:
    """Tasks by units, each task's scores scaled to [0, 1]; an encoder and a decoder one below the other."""
    import plotly.graph_objects as go

    parts = _parts(table.units)
    labels, scaled = unit_labels(table.units), [_scaled(row) for row in rows]
    names = [text(task, _LONGEST) for task in table.tasks]
    cell = max(26 if len(table.tasks) <= 8 else 19, 14 * line_count(names) + 4)
    high = cell * len(table.tasks)
    whole = len(parts) * high + (len(parts) - 1) * (_LABELS + 14)
    figure = go.Figure()
    for n, (title, start, stop) in enumerate(parts):
        axis = str(n + 1) if n else ""
        figure.add_trace(
            go.Heatmap(
                z=[row[start:stop] for row in scaled],
                x=labels[start:stop],
                y=list(range(len(table.tasks))),
                customdata=[[_short(a) for a in row[start:stop]] for row in rows],
                xaxis=f"x{axis}", yaxis=f"y{axis}", coloraxis="coloraxis", ygap=2, hoverongaps=False,
                hovertemplate="<b>%{y}</b> · %{x}<br>%{z:.2f} (score %{customdata:.2~e})<extra></extra>",
            )
        )  # fmt: skip
        top = 1 - n * (high + _LABELS + 14) / whole
        domain = [max(0.0, top - high / whole), top]
        marks = [0, *_borders(table.units[start:stop]), stop - start]
        for mark in marks[1:-1]:
            figure.add_shape(
                type="line", x0=mark - 0.5, x1=mark - 0.5, y0=-0.5, y1=len(table.tasks) - 0.5,
                xref=f"x{axis}", yref=f"y{axis}", line={"color": "var(--card)", "width": 4},
            )  # fmt: skip
        line = {"y": top, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        figure.add_annotation(text=title, x=0, xref="paper", xanchor="right", xshift=-4, **line)
        for a, b in itertools.pairwise(marks):  # no tick labels: the hover would show them as the unit
            layer = _number(table.units[start + a])
            figure.add_annotation(text=layer, x=(a + b - 1) / 2, xref=f"x{axis}", **line)
        figure.update_layout(
            {
                f"xaxis{axis}": {
                    "type": "category", "anchor": f"y{axis}", "showticklabels": False,
                    "range": [-0.5, stop - start - 0.5],
                },
                f"yaxis{axis}": {
                    "domain": domain, "anchor": f"x{axis}", "tickmode": "array",
                    "tickvals": list(range(len(table.tasks))),
                    "ticktext": names,
                    "range": [len(table.tasks) - 0.5, -0.5], "ticklabelstandoff": 4,
                },
            }
        )  # fmt: skip
    frame(figure, height=whole + _LABELS + 8, left=_left(table), top=_LABELS, bottom=8, right=8)
    figure.update_layout(coloraxis={"cmin": 0, "cmax": 1, "colorscale": _SHADES, "showscale": False})
    return finish(figure)


def unit_labels(units: Sequence[Unit]) -> list[str]:
    """What the hover calls each unit, such as "layer 3, self_attn.q_proj, rank 2"."""
    blocks = block_labels(unit.block for unit in units if unit.block)
    named = {block: f"layer {label}" if label.isdigit() else label for block, label in blocks.items()}
    return [
        text(
            (f"{named[unit.block]}, " if unit.block else "")
            + unit.module
            + (f", rank {unit.rank}" if unit.rank is not None else "")
        )
        for unit in units
    ]


def order_note(table: UnitTable) -> str:
    """One line on what stands where within a layer."""
    # T5 numbers the parts of a block
    modules = list(dict.fromkeys(_NUMBERED.sub("", unit.module) for unit in table.units if unit.block))
    ranks = max((unit.rank + 1 for unit in table.units if unit.rank is not None), default=0)
    if not modules:
        return ""
    names = short_modules(modules)
    shown = ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
    each = f", each with its {ranks} ranks" if ranks > 1 else ""
    return f"{len(table.units)} units. Within a layer, from left to right: {shown}{each}."


def _parts(units: Sequence[Unit]) -> list[tuple[str, int, int]]:
    """Title, first and last column of each stack; units outside the blocks stand at the end."""
    starts = [
        i
        for i, unit in enumerate(units)
        if i == 0 or (unit.block and unit.block[0] != (units[i - 1].block or ("", 0))[0])
    ]
    ends = [*starts[1:], len(units)]
    titles = [(units[i].block or ("", 0))[0] or "layer" for i in starts]
    return list(zip(titles, starts, ends, strict=True))


def _borders(units: Sequence[Unit]) -> list[int]:
    return [i for i, (a, b) in enumerate(itertools.pairwise(units), 1) if a.block != b.block]


def _number(unit: Unit) -> str:
    return str(unit.block[1]) if unit.block else "other"


def _scaled(row: Sequence[float | None]) -> list[float | None]:
    """K's Norm (eq. 13) over the units that have a score."""
    known = [a for a in row if a is not None]
    if not known:
        return [None] * len(row)
    values = iter(normalised(torch.tensor(known, dtype=torch.float64)).tolist())
    return [None if a is None else round(next(values), 3) for a in row]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _left(table: UnitTable) -> int:
    longest = max(
        *(min(len(task), _LONGEST) for task in table.tasks), *(len(p[0]) for p in _parts(table.units)), 5
    )
    return 14 + round(6.6 * longest)


def _least_width(table: UnitTable) -> int:
    needed = [
        max(_UNIT * (stop - start), _LAYER * (len(_borders(table.units[start:stop])) + 1))
        for _, start, stop in _parts(table.units)
    ]
    return _left(table) + max(needed) + 8
