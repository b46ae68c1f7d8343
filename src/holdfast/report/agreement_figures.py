"""How far tasks need the same weights or inputs: overlap and correlation by layer (A, figure 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.importance.agreement import TOP
from holdfast.names import Block
from holdfast.quantities import number
from holdfast.report.figures import COLOURS, DASHES, Json, finish, frame, style_of, text
from holdfast.report.importance_map import block_labels
from holdfast.report.task_agreement import KINDS, Pair, TaskAgreement

_ALL = "all"
_MOST_PAIRS = 15  # offered one by one; of more tasks each one with the task before it

Measure = Literal["overlap", "correlation"]


@dataclass(frozen=True)
class AgreementBlock:
    """The section's curves (look and name of each) and the choices of its selector."""

    curves: list[Json]
    choices: list[tuple[str, str]]
    meanings: list[str]  # of the words that say where the priors come from
    min_width: int


def agreement_block(figures: dict[str, Json], found: Sequence[TaskAgreement]) -> AgreementBlock | None:
    """Draw both measures for all pairs together and for each pair; None when there is nothing to compare."""
    if not found:
        return None
    pairs = _pairs(found)
    choices = [(_ALL, f"mean of all {len(pairs)} pairs")] if len(pairs) > 1 else []
    offered = pairs if len(pairs) <= _MOST_PAIRS else _neighbours(pairs)
    choices += [(str(pairs.index(pair)), f"{pair[0]} and {pair[1]}") for pair in offered]
    blocks = block_labels({block for a in found for table in a.tables.values() for block in table})
    kinds = {agreement.kind for agreement in found}
    looks = [_look(agreement) for agreement in found]
    for key, _ in choices:
        chosen = pairs if key == _ALL else [pairs[int(key)]]
        for measure in ("overlap", "correlation"):
            figures[f"{measure}-{key}"] = agreement_figure(measure, found, looks, chosen, blocks)
    meanings = [f"{word}: {meaning}" for kind, (word, meaning) in KINDS.items() if kind in kinds and word]
    return AgreementBlock(looks, choices, meanings, 60 + 14 * len(blocks))


def agreement_figure(
    measure: Measure,
    found: Sequence[TaskAgreement],
    looks: Sequence[Json],
    pairs: Sequence[Pair],
    blocks: dict[Block, str],
) -> Json:
    """One measure by layer, a curve a source: the mean over `pairs`, their range in the hover."""
    import plotly.graph_objects as go

    index, place = 0 if measure == "overlap" else 1, {block: i for i, block in enumerate(blocks)}
    figure, lowest = go.Figure(), 0.0
    for agreement, look in zip(found, looks, strict=True):
        tables = [
            agreement.tables[key] for pair in pairs for key in (pair, pair[::-1]) if key in agreement.tables
        ]
        x, y, hover = [], [], []
        for block, label in blocks.items():
            values = [t[block][index] for t in tables if block in t and not math.isnan(t[block][index])]
            if values:
                mean = sum(values) / len(values)
                x.append(place[block])
                y.append(round(mean, 4))
                spread = (
                    f", {number(min(values), 2)} to {number(max(values), 2)} by pair"
                    if len(values) > 1
                    else ""
                )
                hover.append(f"{f'layer {label}' if label.isdigit() else label}: {number(mean, 2)}{spread}")
        lowest = min([lowest, *y])
        figure.add_scatter(
            x=x, y=y, customdata=hover, name=text(look["name"], 40), mode="lines+markers",
            line={"color": look["colour"], "dash": look["dash"], "width": 2.2},
            marker={"symbol": look["symbol"], "size": 7},
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
        )  # fmt: skip
    chance = TOP if measure == "overlap" else 0.0
    figure.add_hline(y=chance, line={"color": "var(--muted)", "width": 1, "dash": "dot"})
    figure.add_annotation(
        text="chance", x=1, y=chance, xref="paper", yref="y", xanchor="right", yanchor="bottom",
        showarrow=False, font={"size": 11},
    )  # fmt: skip
    stacks = [stack for stack, _ in blocks]
    border = stacks.index("decoder") if "encoder" in stacks and "decoder" in stacks else 0
    if border:
        figure.add_vline(x=border - 0.5, line={"color": "var(--rule)", "width": 1})
    stride = math.ceil(len(blocks) / 12)
    shown = [i for i, (_, layer) in enumerate(blocks) if layer % stride == 0]
    numbers = [str(layer) for _, layer in blocks]
    title = "layer: encoder, then decoder" if border else "layer, from the input up"
    frame(figure, height=270, left=40, top=8, bottom=44)
    figure.update_xaxes(
        tickvals=shown, ticktext=[numbers[i] for i in shown], range=[-0.4, len(blocks) - 0.6],
        title={"text": title, "font": {"size": 12}}, ticklabelstandoff=2,
    )  # fmt: skip
    bottom = -1.05 if lowest < -0.25 else min(lowest, 0.0) - 0.06
    figure.update_yaxes(range=[bottom, 1.04], nticks=6, showgrid=True, tickformat=".2~f")
    return finish(figure)


def _look(agreement: TaskAgreement) -> Json:
    """A method keeps its colour; priors of models of their own are dashed, attributions grey."""
    word, _ = KINDS[agreement.kind]
    name = f"{agreement.label}, {word}" if word else agreement.label
    if agreement.group is None:
        return {"colour": "var(--joint)", "dash": "dot", "symbol": "x", "name": name}
    style = style_of(agreement.group, joint=False)
    if agreement.kind == "single_task":
        style["dash"] = DASHES[(agreement.group // COLOURS + 1) % len(DASHES)]
    return {**style, "name": name}


def _pairs(found: Sequence[TaskAgreement]) -> list[Pair]:
    pairs: list[Pair] = []
    for agreement in found:
        pairs += [pair for pair in agreement.tables if pair not in pairs and pair[::-1] not in pairs]
    return pairs


def _neighbours(pairs: Sequence[Pair]) -> list[Pair]:
    """Of pairs listed as combinations of an ordered stream: the first of each task."""
    firsts: dict[str, Pair] = {}
    for pair in pairs:
        firsts.setdefault(pair[0], pair)
    return list(firsts.values())
