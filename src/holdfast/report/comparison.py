"""The sweep's part of the page: paired differences, and AP against learning accuracy over a strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.quantities import interval, short, spread
from holdfast.records import Comparison, ComparisonCurve, ComparisonRow, CurvePoint
from holdfast.report.figures import Json, finish, frame, style_of, text
from holdfast.report.panels import Panel
from holdfast.report.summary import Group

SHOWN = (("ap", "AP"), ("bwt", "BWT"), ("learning_accuracy", "Learning"))


@dataclass(frozen=True)
class ComparedCell:
    """One metric of a line: the mean, how it is printed, and the difference from the reference."""

    mean: float | None
    text: str
    difference: str


@dataclass(frozen=True)
class ComparedRow:
    """A line of the table."""

    label: str
    look: Json
    cells: tuple[ComparedCell, ...]
    runs: str
    command: str
    reference: bool
    complete: bool


@dataclass(frozen=True)
class ComparisonBlock:
    """One sweep on the page."""

    sweep: Comparison
    heads: tuple[str, ...]
    rows: tuple[ComparedRow, ...]
    panels: tuple[Panel, ...]


def comparison_blocks(
    figures: dict[str, Json], sweeps: Sequence[Comparison], groups: Sequence[Group]
) -> list[ComparisonBlock]:
    """The blocks of the section, one a sweep; their figures are added to `figures`."""
    return [_block(figures, n, sweep, groups) for n, sweep in enumerate(sweeps)]


def _block(figures: dict[str, Json], n: int, sweep: Comparison, groups: Sequence[Group]) -> ComparisonBlock:
    looks = _looks(sweep, groups)
    rows = tuple(_row(row, looks[row.label], sweep.reference) for row in sweep.rows)
    panels = []
    for split, title in (("test", "on test rows"), ("validation", "on validation rows, used to choose")):
        drawn = tradeoff(sweep, split, looks)
        if drawn is not None:
            key = f"tradeoff-{n}-{split}"
            figures[key] = drawn
            panels.append(Panel(key, f"AP against learning accuracy, {title}"))
    return ComparisonBlock(sweep, tuple(name for _, name in SHOWN), rows, tuple(panels))


def _looks(sweep: Comparison, groups: Sequence[Group]) -> dict[str, Json]:
    """Colour and marker of each line and of each row: those that its runs have elsewhere on the page."""
    known = {group.label: style_of(i, group.joint) for i, group in enumerate(groups)}
    looks: dict[str, Json] = {}
    for n, row in enumerate(sweep.rows):
        looks[row.label] = known.get(row.label) or style_of(len(groups) + n, row.strategy == "multitask")
        looks.setdefault(f"row {row.row}", looks[row.label])
    for curve in sweep.curves:  # a row of which nothing was tested yet
        looks.setdefault(f"row {curve.row}", style_of(len(groups) + len(looks), False))
    return looks


def _row(row: ComparisonRow, look: Json, reference: str | None) -> ComparedRow:
    done = sum(run.status == "finished" for run in row.runs)
    scores = [(row.scores[key], (row.differences or {}).get(key)) for key, _ in SHOWN]
    cells = tuple(
        ComparedCell(s.mean, spread(s.mean, s.sd), "" if d is None else interval(d.mean, d.low, d.high))
        for s, d in scores
    )
    return ComparedRow(
        label=row.label,
        look=look,
        cells=cells,
        runs=f"{done} of {len(row.runs)}",
        command=row.command,
        reference=row.label == reference,
        complete=done == len(row.runs),
    )


def tradeoff(sweep: Comparison, split: str, looks: dict[str, Json]) -> Json | None:
    """AP against learning accuracy: a curve a grid over its strength, a point for each line without one.

    None where there are fewer than two points.
    """
    import plotly.graph_objects as go

    figure, count = go.Figure(), 0
    for curve in (c for c in sweep.curves if c.split == split):
        count += len(curve.points)
        _add(
            figure,
            _name(curve),
            looks[f"row {curve.row}"],
            [_point(p) for p in curve.points],
            curve,
        )
    on_a_curve = {curve.row for curve in sweep.curves if curve.split == split}
    for row in sweep.rows if split == "test" else ():
        ap, learned = row.scores["ap"].mean, row.scores["learning_accuracy"].mean
        if row.row not in on_a_curve and ap is not None and learned is not None:
            count += 1
            _add(figure, row.label, looks[row.label], [(learned, ap, "")])
    if count < 2:
        return None
    frame(figure, height=330, left=48, top=10, bottom=46)
    figure.update_xaxes(title={"text": "learning accuracy (%)"}, showgrid=True, nticks=6, automargin=True)
    figure.update_yaxes(title={"text": "AP (%)"}, showgrid=True, nticks=6, automargin=True)
    return finish(figure)


def _add(
    figure: Any,
    name: str,
    look: Json,
    points: Sequence[tuple[float, float, str]],
    curve: ComparisonCurve | None = None,
) -> None:
    """A trace; the last point of a curve carries its name, so that no key is needed."""
    figure.add_scatter(
        x=[x for x, *_ in points], y=[y for _, y, _ in points], name=text(name, 28),
        customdata=[at for *_, at in points],
        mode="lines+markers+text" if curve else "markers+text",
        text=[*[""] * (len(points) - 1), text(name, 24)], textposition="top center",
        textfont={"size": 12, "color": "var(--ink)"},
        line={"color": look["colour"], "dash": look["dash"], "width": 2.2},
        marker={"symbol": look["symbol"], "size": 10, "color": look["colour"]}, cliponaxis=False,
        hovertemplate="<b>%{fullData.name}</b>%{customdata}<br>learning accuracy %{x:.1f} %, AP %{y:.1f} %"
        "<extra></extra>",
    )  # fmt: skip


def _point(point: CurvePoint) -> tuple[float, float, str]:
    return point.learning_accuracy, point.ap, f" at {short(point.value)}"


def _name(curve: ComparisonCurve) -> str:
    fixed = ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in curve.fixed.items())
    return f"{curve.row} · {fixed}" if fixed else curve.row
