"""How far old outputs moved: by layer, and against what was forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from holdfast.names import Block, block_of
from holdfast.quantities import number, percent
from holdfast.report.figures import Json, finish, frame, text
from holdfast.report.importance_map import block_labels
from holdfast.report.panels import Panel
from holdfast.report.read import RunRecord, StageRecord

_ENOUGH = 6  # points for a rank correlation to be worth a sentence

Styled = Sequence[tuple[RunRecord, Json]]


class Point(NamedTuple):
    """One task of one run: how far outputs moved after it, and what it lost, both in percent."""

    task: str
    moved: float
    lost: float


def moved_panels(figures: dict[str, Json], styled: Styled) -> list[Panel]:
    """Both figures, as far as runs were held by their inputs."""
    panels = []
    by_layer = moved_by_layer(styled)
    if by_layer is not None:
        figures["moved-layers"] = by_layer
        panels.append(Panel("moved-layers", "By layer"))
    points = [(run, style, found) for run, style in styled if (found := moved_and_lost(run))]
    if points:
        figures["moved-lost"] = moved_against_lost(points)
        every = [point for *_, found in points for point in found]
        panels.append(Panel("moved-lost", "Against what was forgotten", note=_said(every)))
    return panels


def moved_and_lost(run: RunRecord) -> list[Point]:
    """Each task but the last: the root of the sum of the later stages' drifts, and its lost accuracy."""
    tasks, matrix = run.metrics.tasks, run.metrics.matrix
    if run.joint or run.seen < len(tasks) or len(run.stages) < len(tasks):
        return []
    drifts = [_total(stage) for stage in run.stages]
    found = []
    for i, task in enumerate(tasks[:-1]):
        later = drifts[i + 1 :]
        then, now = matrix[i + 1][i], matrix[-1][i]
        if then is not None and now is not None and all(d is not None for d in later):
            found.append(Point(task, 100 * sum(d or 0.0 for d in later) ** 0.5, then - now))
    return found


def moved_by_layer(styled: Styled) -> Json | None:
    """A curve a run: root mean square over the maps of each block and all its stages, in percent."""
    import plotly.graph_objects as go

    curves = [(run, style, means) for run, style in styled if (means := _by_block(run))]
    if not curves:
        return None
    labels = block_labels(block for *_, means in curves for block in means)
    place = {block: i for i, block in enumerate(labels)}
    figure = go.Figure()
    for run, style, means in curves:
        blocks = sorted(means, key=place.__getitem__)
        figure.add_scatter(
            x=[place[b] for b in blocks], y=[means[b] for b in blocks],
            customdata=[f"layer {labels[b]}: {percent(means[b], 2)}" for b in blocks],
            name=text(run.name, 28), mode="lines+markers",
            line={"color": style["colour"], "dash": style["dash"], "width": 2.2},
            marker={"symbol": style["symbol"], "size": 7},
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
        )  # fmt: skip
    frame(figure, height=270, left=44, top=8, bottom=44)
    figure.update_xaxes(
        tickvals=list(range(len(labels))), ticktext=[text(label) for label in labels.values()],
        title={"text": "layer, from the input up", "font": {"size": 12}},
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero", showgrid=True, nticks=5, ticksuffix=" %")
    return finish(figure)


def moved_against_lost(points: Sequence[tuple[RunRecord, Json, list[Point]]]) -> Json:
    """A point for each run and task."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for run, style, found in points:
        figure.add_scatter(
            x=[p.moved for p in found], y=[p.lost for p in found],
            customdata=[text(p.task) for p in found], name=text(run.name, 28), mode="markers",
            marker={"color": style["colour"], "symbol": style["symbol"], "size": 10},
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}: outputs moved %{x:.2f} %, "
            "%{y:.1f} points lost<extra></extra>",
        )  # fmt: skip
    frame(figure, height=270, left=44, top=8, bottom=44)
    figure.update_xaxes(
        rangemode="tozero", showgrid=True, nticks=6, ticksuffix=" %",
        title={"text": "old outputs moved since the task was learned", "font": {"size": 12}},
    )  # fmt: skip
    figure.update_yaxes(showgrid=True, nticks=5, title={"text": "accuracy lost", "font": {"size": 12}})
    return finish(figure)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's; None where one of both is constant."""
    a, b = _ranks(x), _ranks(y)
    mean = (len(a) - 1) / 2
    top = sum((i - mean) * (j - mean) for i, j in zip(a, b, strict=True))
    bottom = (sum((i - mean) ** 2 for i in a) * sum((j - mean) ** 2 for j in b)) ** 0.5
    return top / bottom if bottom > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def _said(points: Sequence[Point]) -> str:
    if len(points) < _ENOUGH:
        return ""
    value = rank_correlation([p.moved for p in points], [p.lost for p in points])
    return "" if value is None else f"rank correlation {number(value, 2)} over {len(points)} points"


def _total(stage: StageRecord) -> float | None:
    return None if stage.gate is None or stage.gate.drift is None else stage.gate.drift.total


def _by_block(run: RunRecord) -> dict[Block, float]:
    found: dict[Block, list[float]] = defaultdict(list)
    for stage in run.stages:
        if stage.gate is None or stage.gate.drift is None:
            continue
        for name, value in stage.gate.drift.maps.items():
            block = block_of(name)
            if block is not None:
                found[block].append(value)
    return {block: 100 * (sum(values) / len(values)) ** 0.5 for block, values in found.items()}
