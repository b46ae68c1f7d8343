"""What becomes of the first task: its accuracy through the whole stream (K, figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from holdfast.quantities import number
from holdfast.report.figures import Json, finish, frame, line_count, longest_line, style_of, text
from holdfast.report.panels import Panel
from holdfast.report.summary import Group

_LONGEST = 16  # characters of a task's name
_NOTED = 6  # methods whose numbers fit in a line
_WHO = "<b>%{fullData.name}</b><br>"


def first_task_panel(
    figures: dict[str, Json], key: str, groups: Sequence[Group], tasks: Sequence[str]
) -> Panel | None:
    """Draw one curve a method, the mean of its seeds; None when no run of this stream measured the task."""
    kept = [
        (i, replace(group, runs=tuple(run for run in group.runs if run.metrics.tasks == list(tasks))))
        for i, group in enumerate(groups)
    ]
    members = [(i, group) for i, group in kept if group.runs]
    figure = _figure(members, tasks)
    if figure is None:
        return None
    figures[key] = figure
    names = _names(tasks)
    step = 40 if _slanted(names) else 8 + round(6.6 * longest_line(names))
    return Panel(key, tasks[0], min_width=60 + step * len(names), note=_note(members, tasks))


def _figure(members: Sequence[tuple[int, Group]], tasks: Sequence[str]) -> Json | None:
    import plotly.graph_objects as go

    names = _names(tasks)
    hover = ["before training", *(f"after {text(task)}" for task in tasks)]
    figure, first = go.Figure(), 1
    for i, group in members:
        style, y = style_of(i, group.joint), _trajectory(group)
        known = [stage for stage, a in enumerate(y) if a is not None]
        if not known:
            continue
        first = min(first, known[0])
        if group.joint:
            figure.add_scatter(
                x=[-0.5, len(y) - 0.5], y=[y[-1]] * 2, mode="lines", name=text(group.label, 28),
                line={"color": style["colour"], "dash": style["dash"], "width": 1.6},
                hovertemplate=f"{_WHO}trained on all tasks at once: %{{y:.1f}} %<extra></extra>",
            )  # fmt: skip
            continue
        seeds = [[row[0] for row in run.metrics.matrix] for run in group.runs]
        for values in seeds if len(seeds) > 1 else ():
            figure.add_scatter(
                x=list(range(len(values))), y=values, mode="lines", hoverinfo="skip", connectgaps=True,
                line={"color": style["colour"], "width": 1}, opacity=0.3,
            )  # fmt: skip
        figure.add_scatter(
            x=list(range(len(y))), y=y, name=text(group.label, 28), mode="lines+markers", connectgaps=True,
            customdata=[[name, _range(values)] for name, *values in zip(hover, *seeds, strict=True)],
            line={"color": style["colour"], "dash": style["dash"], "width": 3},
            marker={"symbol": style["symbol"], "size": 9},
            hovertemplate=_WHO + "%{customdata[0]}: %{y:.1f} %%{customdata[1]}<extra></extra>",
        )  # fmt: skip
    if not figure.data:
        return None
    slanted = _slanted(names)
    more = 12 * (line_count(names) - 1)
    bottom = more + (22 + round(4.8 * longest_line(names)) if slanted else 30)
    frame(figure, height=270 + bottom, left=34, top=8, bottom=bottom)
    figure.update_xaxes(
        tickvals=list(range(first, len(names))), ticktext=names[first:], ticklabelstandoff=4,
        tickangle=-35 if slanted else 0, range=[first - 0.25, len(tasks) + 0.25],
    )  # fmt: skip
    figure.update_yaxes(range=[-6, 104], tickvals=[0, 25, 50, 75, 100], showgrid=True)
    return finish(figure)


def _names(tasks: Sequence[str]) -> list[str]:
    return ["before", text(tasks[0], _LONGEST), *(f"+ {text(task, _LONGEST)}" for task in tasks[1:])]


def _slanted(names: Sequence[str]) -> bool:
    return longest_line(names) * len(names) > 90


def _trajectory(group: Group) -> list[float | None]:
    return [row[0] for row in group.mean_matrix() or []]


def _range(values: Sequence[float | None]) -> str:
    known = [a for a in values if a is not None]
    return f" ({number(min(known))} to {number(max(known))})" if len(known) > 1 else ""


def _note(members: Sequence[tuple[int, Group]], tasks: Sequence[str]) -> str:
    """From right after it was learned to the end, in numbers."""
    said = []
    for _, group in members:
        y = _trajectory(group)
        if not group.joint and y[1] is not None and y[-1] is not None:
            said.append(f"{group.label} {number(y[1], 0)} → {number(y[-1], 0)} %")
    if not said or len(said) > _NOTED or len(tasks) < 2:
        return ""
    return f"From right after it was learned to the end of the stream: {'; '.join(said)}."
