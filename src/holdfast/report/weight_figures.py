"""Figures of weights: importance by layer and module, how firmly they are held, and the zeroing test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from holdfast.quantities import count, rounded, short
from holdfast.records import Faithfulness, ProtectionSummary
from holdfast.report.figures import HEAT, Json, finish, frame, text
from holdfast.report.importance_map import ImportanceMap


def importance(heat: ImportanceMap, bounds: tuple[float, float]) -> Json:
    """Mean importance by layer and module; the log colour scale runs over `bounds`, shared by all tasks."""
    import plotly.graph_objects as go

    low, high = math.log10(bounds[0]), math.log10(bounds[1])
    if high - low < 0.1:
        low, high = low - 0.5, high + 0.5
    span = high - low
    z = [[math.log10(m) if m else None for m in row] for row in heat.means]
    exponents = list(range(math.ceil(low), math.floor(high) + 1))
    ticks = exponents if len(exponents) > 1 else [low + span * i / 3 for i in range(4)]
    figure = go.Figure(
        go.Heatmap(
            z=z, x=list(range(len(heat.modules))), y=list(range(len(heat.layers))),
            customdata=_hover(heat),
            zmin=low, zmax=high, colorscale=HEAT, xgap=1, ygap=1, hoverongaps=False,
            colorbar={
                "orientation": "h", "y": 0, "yref": "paper", "yanchor": "top", "ypad": 8, "len": 1.0,
                "thickness": 8,
                "tickvals": ticks, "ticktext": [rounded(10**t, 2) for t in ticks], "outlinewidth": 0,
                "tickfont": {"size": 11},
            },
            hovertemplate="layer %{customdata[0]}, %{customdata[1]}: %{customdata[2]}<extra></extra>",
        )
    )  # fmt: skip
    names = short_modules(heat.modules)
    longest = max((len(n) for n in names), default=0)
    top = 14 + round(longest * 5)
    cell = min(40, max(18, round(190 / max(len(heat.layers), 1))))
    frame(
        figure, height=cell * len(heat.layers) + top + 44,
        left=8, top=top, bottom=44, right=round(longest * 6),
    )  # fmt: skip
    figure.update_xaxes(
        side="top", tickvals=list(range(len(names))), ticktext=[text(n) for n in names], tickangle=-40,
        showline=False, ticks="",
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(heat.layers))),
        ticktext=[f"layer {n}" if n.isdigit() else n for n in heat.layers],
        autorange="reversed", automargin=True, showline=False, ticks="",
    )  # fmt: skip
    return finish(figure)


def _hover(heat: ImportanceMap) -> list[list[list[str]]]:
    return [
        [
            [text(layer), text(module), rounded(mean or 0)]
            for module, mean in zip(heat.modules, row, strict=True)
        ]
        for layer, row in zip(heat.layers, heat.means, strict=True)
    ]


def short_modules(modules: Sequence[str]) -> list[str]:
    """Drop a path's first part (``self_attn.q_proj`` to ``q_proj``) where that stays unambiguous."""
    short = [m.split(".", 1)[-1] if not m.startswith("lora") else m for m in modules]
    return short if len(set(short)) == len(short) else list(modules)


def gate_histogram(gate: ProtectionSummary, colour: str) -> Json | None:
    """The share of weights by how firmly they are held, on a log scale; None when nothing was counted."""
    import plotly.graph_objects as go

    if gate.histogram is None or not sum(gate.histogram.counts):
        return None
    edges, counts = gate.histogram.edges, gate.histogram.counts
    bins = list(zip(edges, edges[1:], counts, strict=False))
    share = [100 * n / sum(counts) for n in counts]
    logarithmic = edges[0] > 0 and edges[-1] / edges[0] > 1000  # a penalty's weights span decades
    place = [math.log10(edge) if logarithmic else edge for edge in edges]
    figure = go.Figure(
        go.Bar(
            x=[(a + b) / 2 for a, b in itertools.pairwise(place)], y=[s or None for s in share],
            width=[b - a for a, b in itertools.pairwise(place)],
            marker={"color": colour, "line": {"color": "var(--card)", "width": 1.5}},
            customdata=[[f"{rounded(low)} to {rounded(high)}", count(int(n))] for low, high, n in bins],
            hovertemplate="%{customdata[0]}: %{y:.3g} %, %{customdata[1]} weights<extra></extra>",
        )
    )  # fmt: skip
    lowest = max(math.floor(math.log10(min(s for s in share if s))), -4)
    frame(figure, height=270, left=8, top=8, bottom=44)
    if logarithmic:
        decades = range(math.ceil(place[0]), math.floor(place[-1]) + 1)
        stride = math.ceil(len(decades) / 5)
        figure.update_xaxes(
            tickvals=list(decades)[::stride], ticktext=[short(10.0**d) for d in decades][::stride]
        )
    figure.update_xaxes(title={"text": text(gate.quantity), "font": {"size": 12}}, showline=True, ticklen=3)
    figure.update_yaxes(
        type="log", range=[lowest - 0.1, 2.1], tickvals=[10.0**d for d in range(lowest, 3)],
        ticktext=[f"{short(10.0**d)} %" for d in range(lowest, 3)], showgrid=True, automargin=True,
    )  # fmt: skip
    return finish(figure)


def faithfulness(curves: Faithfulness) -> Json:
    """Accuracy against the share of weights zeroed, by who chose them."""
    import plotly.graph_objects as go

    looks: Mapping[str, Json] = {
        "importance": {"color": "var(--run-0)", "width": 3},
        "magnitude": {"color": "var(--run-1)", "width": 2, "dash": "dash"},
        "random": {"color": "var(--joint)", "width": 2, "dash": "dot"},
    }
    figure = go.Figure()
    steps = list(range(len(curves.percent)))
    for who, values in curves.curves.items():
        figure.add_scatter(
            x=steps, y=values, name=text(who), mode="lines+markers", connectgaps=True,
            line=looks.get(who, {"color": "var(--run-2)", "width": 2}), marker={"size": 7},
            hovertemplate="<b>%{fullData.name}</b>: %{y:.1f} %<extra></extra>",
        )  # fmt: skip
    frame(figure, height=260, left=40, top=8, bottom=44)
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin_t=34
    )
    figure.update_xaxes(
        tickvals=steps, ticktext=[short(p) for p in curves.percent],
        title={"text": "% of weights set to zero in each tensor", "font": {"size": 12}},
    )  # fmt: skip
    figure.update_yaxes(range=[-6, 104], tickvals=[0, 25, 50, 75, 100], showgrid=True)
    return finish(figure)
