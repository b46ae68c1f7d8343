"""Figures of scores, as plotly JSON. Colours are CSS variables; the page fills them in by its theme."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.quantities import number
from holdfast.report.read import RunRecord
from holdfast.report.summary import Group

if TYPE_CHECKING:
    import plotly.graph_objects as go

Json = dict[str, Any]
Matrix = Sequence[Sequence[float | None]]
COLOURS = 7  # --run-0 … --run-6 in style.css
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif'
_MOST_POINTS = 300  # of one loss curve; the eye can't tell more in a small panel
_HIGH = 68.0  # from here on a cell is dark enough for light text (and the reverse in the dark theme)
_PARTS = re.compile(r"[^\s_/.:-]*[\s_/.:-]+|[^\s_/.:-]+")  # of a name that is too long for a line
_PAGE = 700  # px of a printed page for the overview
HEAT = [[i / 4, f"var(--heat-{i})"] for i in range(5)]


def style_of(group: int, joint: bool) -> Json:
    """Colour, dash and marker of a method: the same in every figure, never colour alone."""
    if joint:
        return {"colour": "var(--joint)", "dash": "dash", "symbol": "line-ns-open"}
    return {
        "colour": f"var(--run-{group % COLOURS})",
        "dash": DASHES[group // COLOURS % len(DASHES)],
        "symbol": SYMBOLS[group % len(SYMBOLS)],
    }


def text(value: str, width: int = 0) -> str:
    """Text for plotly, which reads a few HTML tags: escaped, and in lines of at most `width` characters."""
    return "<br>".join(html.escape(line) for line in _wrapped(value, width)) if width else html.escape(value)


def _wrapped(value: str, width: int) -> list[str]:
    """Lines broken behind spaces and signs, and within a part only where it is longer than a line."""
    lines = [""]
    for part in _PARTS.findall(value):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.strip() for line in lines]


def line_count(labels: Iterable[str]) -> int:
    """The most lines that `text` made of one of these."""
    return max((label.count("<br>") + 1 for label in labels), default=1)


def longest_line(labels: Iterable[str]) -> int:
    """Characters of the longest line that `text` made of these."""
    return max((len(html.unescape(line)) for label in labels for line in label.split("<br>")), default=0)


def overview(groups: Sequence[Group]) -> Json | None:
    """For each method a bar from what it had learned to what it has in the end."""
    import plotly.graph_objects as go

    shown = [(i, g) for i, g in enumerate(groups) if g.mean("ap") is not None]
    if len(shown) < 2:
        return None
    figure = go.Figure()
    for row, (index, group) in enumerate(shown):
        style, ap, learned = style_of(index, group.joint), group.mean("ap"), group.mean("learning_accuracy")
        name = text(group.label)
        if learned is not None:
            figure.add_scatter(
                x=[learned, ap],
                y=[row, row],
                mode="lines",
                hoverinfo="skip",
                line={"color": style["colour"], "width": 6},
                opacity=0.28,
            )
            figure.add_scatter(
                x=[learned],
                y=[row],
                mode="markers",
                name=name,
                marker={"color": "var(--card)", "size": 13, "line": {"color": style["colour"], "width": 2.5}},
                hovertemplate="right after learning each task: %{x:.1f} %<extra></extra>",
            )
        figure.add_scatter(
            x=[ap],
            y=[row],
            mode="markers",
            name=name,
            marker={"color": style["colour"], "size": 15},
            hovertemplate="at the end of the stream: %{x:.1f} %<extra></extra>",
        )
        side = -20 if ap is not None and learned is not None and ap <= learned else 20
        for x, shift, size, look in ((ap, side, 14, "ink"), (learned, -side, 12, "muted")):
            if x is not None:
                value = number(x, 0) if look == "muted" else f"<b>{number(x, 0)}</b>"
                figure.add_annotation(
                    x=x, y=row, text=value, showarrow=False, xshift=shift,
                    font={"size": size, "color": f"var(--{look})"},
                )  # fmt: skip
    labels = [text(group.label, 26) for _, group in shown]
    high = max(16 * line_count(labels) + 4, min(44, _PAGE // len(shown)))
    frame(figure, height=high * len(shown) + 34, left=8, top=4, bottom=24)
    figure.update_xaxes(range=[-6, 108], tickvals=[0, 25, 50, 75, 100], showgrid=True)
    figure.update_yaxes(
        tickvals=list(range(len(shown))), ticktext=labels,
        range=[len(shown) - 0.4, -0.6], automargin=True, ticklen=6,
        tickfont={"size": 14, "color": "var(--ink)"},
    )  # fmt: skip
    return finish(figure)


def matrix(rows: Matrix, tasks: Sequence[str], joint: bool) -> Json:
    """The accuracy matrix: a row for each stage (zero-shot first), a column for each task."""
    import plotly.graph_objects as go

    measured = [j for j, row in enumerate(rows) if any(a is not None for a in row)]
    first, last = min(measured, default=0), max(measured, default=0)
    if not joint:  # no zero-shot row when it was not measured, and an unfinished run stops early
        measured = list(range(min(first, 1), last + 1))
    stages = measured
    z = [rows[j] for j in stages]
    names = ["before training", *(f"after {name}" for name in tasks)]
    short = ["before", *(f"+ {text(name, 16)}" for name in tasks)]
    if joint:
        names[-1] = short[-1] = "all at once"
    hover = [[[text(task), text(names[j])] for task in tasks] for j in stages]
    figure = go.Figure(
        go.Heatmap(
            z=z, x=list(range(len(tasks))), y=list(range(len(stages))), customdata=hover,
            zmin=0, zmax=100, colorscale=HEAT, showscale=False, xgap=2, ygap=2, hoverongaps=False,
            hovertemplate="<b>%{customdata[0]}</b> %{customdata[1]}: %{z:.1f} %<extra></extra>",
        )
    )  # fmt: skip
    numbers = [(i, row, a) for row, values in enumerate(z) for i, a in enumerate(values) if a is not None]
    figure.add_scatter(
        x=[i for i, *_ in numbers], y=[row for _, row, _ in numbers], mode="text", hoverinfo="skip",
        text=[number(a, 0) for *_, a in numbers],
        textfont={"size": 13, "color": [f"var(--on-{'high' if a >= _HIGH else 'low'})" for *_, a in numbers]},
    )  # fmt: skip
    for row, j in enumerate(stages):
        if j > 0 and not joint and rows[j][j - 1] is not None:
            figure.add_shape(
                type="rect", x0=j - 1.47, x1=j - 0.53, y0=row - 0.46, y1=row + 0.46,
                line={"color": "var(--ink)", "width": 2.5},
            )  # fmt: skip
    above = [text(task, 16) for task in tasks]
    longest, more = longest_line(above), 12 * (line_count(above) - 1)
    slanted = longest * len(tasks) > 30
    top = 14 + round(longest * 4.6) + more if slanted else 28 + more
    high = max(34, 14 * line_count(short) + 4)
    frame(figure, height=high * len(stages) + top + 8, left=8, top=top, bottom=6, right=14 + 14 * slanted)
    figure.update_xaxes(
        side="top", tickvals=list(range(len(tasks))), ticktext=above,
        tickangle=-35 if slanted else 0, range=[-0.5, len(tasks) - 0.5], showline=False, ticks="",
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(stages))), ticktext=[short[j] for j in stages],
        range=[len(stages) - 0.5, -0.5], automargin=True, showline=False, ticks="",
    )  # fmt: skip
    return finish(figure)


def task_curve(task: int, runs: Sequence[tuple[RunRecord, Json]]) -> Json | None:
    """One task's accuracy over the stream, all runs overlaid; None when no run measured it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    count = 0
    for run, style in runs:
        values = [row[task] for row in run.metrics.matrix]
        y: list[float | None] = [values[-1]] * 2
        count = max(count, len(values) - 1)
        names = [text(n) for n in ("before training", *(f"after {name}" for name in run.metrics.tasks))]
        if run.joint:
            if values[-1] is None:
                continue
            x, names = [0, len(values) - 1], ["trained on all tasks at once"] * 2
        else:
            x, y = list(range(len(values))), values
        figure.add_scatter(
            x=x, y=y, customdata=names, name=text(run.name, 28),
            mode="lines" if run.joint else "lines+markers",
            line={"color": style["colour"], "dash": style["dash"], "width": 1.6 if run.joint else 2.2},
            marker={"symbol": style["symbol"], "size": 7}, connectgaps=True,
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}: %{y:.1f} %<extra></extra>",
        )  # fmt: skip
    if not any(a is not None for trace in figure.data for a in trace.y):
        return None
    figure.add_vline(x=task + 1, line={"color": "var(--muted)", "width": 1, "dash": "dot"})
    frame(figure, height=190, left=34, top=8, bottom=26)
    figure.update_xaxes(range=[-0.25, count + 0.25], dtick=max(1, math.ceil(count / 5)), ticklabelstandoff=2)
    figure.update_yaxes(range=[-6, 104], tickvals=[0, 50, 100], showgrid=True)
    return finish(figure)


def loss_curve(name: str, runs: Sequence[tuple[RunRecord, Json]]) -> Json | None:
    """Training loss on one task, all runs overlaid; None when none was logged."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for run, style in runs:
        for stage in run.stages:
            if stage.task != name or stage.training is None or not stage.training.loss:
                continue
            stride = math.ceil(len(stage.training.loss) / _MOST_POINTS)
            points = stage.training.loss[::stride]
            figure.add_scatter(
                x=[step for step, _ in points], y=[loss for _, loss in points], name=text(run.name, 28),
                mode="lines" if len(points) > 1 else "markers",
                line={"color": style["colour"], "dash": style["dash"], "width": 1.8},
                hovertemplate="<b>%{fullData.name}</b><br>step %{x}: %{y:.3g}<extra></extra>",
            )  # fmt: skip
    if not figure.data:
        return None
    frame(figure, height=190, left=40, top=8, bottom=26)
    figure.update_xaxes(nticks=5, ticklabelstandoff=4)
    figure.update_yaxes(rangemode="tozero", showgrid=True, nticks=4)
    return finish(figure)


def kl_curve(key: str, runs: Sequence[tuple[RunRecord, Json]]) -> Json | None:
    """KL to the base after each stage, all runs overlaid; None when no run measured it.

    Parameters
    ----------
    key : {"kl_base", "kl_new"}
        Measured on the base's own rows, or on those of the task that was just learned.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for run, style in runs:
        values: list[float | None] = getattr(run.metrics, key)
        if all(value is None for value in values):
            continue
        tasks = ["all tasks at once"] if run.joint else run.metrics.tasks
        start = [0.0] if key == "kl_base" else []  # the base is where it is
        moments = [*["before training"][: len(start)], *(f"after {name}" for name in tasks)]
        names = [text(moment) for moment in moments]
        y = [*start, *values]
        figure.add_scatter(
            x=list(range(1 - len(start), len(values) + 1)), y=y, customdata=names[: len(y)],
            name=text(run.name, 28), mode="lines+markers", connectgaps=True,
            line={"color": style["colour"], "dash": style["dash"], "width": 2.2},
            marker={"symbol": style["symbol"], "size": 7},
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}: %{y:.3g} nats<extra></extra>",
        )  # fmt: skip
    if not figure.data:
        return None
    frame(figure, height=210, left=44, top=8, bottom=26)
    figure.update_xaxes(dtick=1, ticklabelstandoff=2)
    figure.update_yaxes(rangemode="tozero", showgrid=True, nticks=5)
    return finish(figure)


def frame(figure: go.Figure, *, height: int, left: int, top: int, bottom: int, right: int = 14) -> None:
    """What all figures share: no plotly template, transparent ground, no zoom (a phone must scroll)."""
    import plotly.graph_objects as go

    figure.update_layout(
        template=go.layout.Template(), height=height, showlegend=False, dragmode=False,
        margin={"l": left, "r": right, "t": top, "b": bottom},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": "var(--muted)"},
        hoverlabel={"bgcolor": "var(--ink)", "bordercolor": "var(--ink)",
                    "font": {"color": "var(--paper)", "family": FONT, "size": 12}, "namelength": -1},
    )  # fmt: skip
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(
            fixedrange=True, showgrid=False, zeroline=False, showline=False, linecolor="var(--rule)",
            gridcolor="var(--rule)", ticks="", ticklen=0, tickfont={"size": 12},
        )  # fmt: skip


def finish(figure: go.Figure) -> Json:
    """A figure as the JSON that plotly.js draws."""
    import plotly.io

    made: Json = json.loads(plotly.io.to_json(figure, validate=True))
    return made
