"""Puts the sections of the report together and renders the page."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.importance.agreement import WIDTH
from holdfast.learner.asked import ends
from holdfast.quantities import number, rounded
from holdfast.records import Faithfulness
from holdfast.report import figures as draw
from holdfast.report import weight_figures as weights
from holdfast.report.agreement_figures import agreement_block
from holdfast.report.comparison import comparison_blocks
from holdfast.report.describe import describe
from holdfast.report.facts import common, costs, details, flat
from holdfast.report.first_task import first_task_panel
from holdfast.report.forgotten import forgotten
from holdfast.report.headline import faithfulness_sentence, headline
from holdfast.report.importance_map import ImportanceMap, importance_map, kind_of
from holdfast.report.lines import Line, lines_of
from holdfast.report.moved_figures import moved_panels
from holdfast.report.packed import pack, plotly
from holdfast.report.panels import Panel, column
from holdfast.report.read import AnyRecord, AttributionRecord, ComparisonRecord, RunRecord, StageRecord
from holdfast.report.summary import (
    COLUMNS,
    Group,
    distinct,
    grouped,
    table,
)
from holdfast.report.task_agreement import SAMPLE, task_agreements
from holdfast.report.unit_figures import unit_panels

_HERE = Path(__file__).parent


@dataclass
class WeightBlock:
    """Importance and gate of one run; `stages` are the choices of its selector."""

    key: str
    run: int | None
    title: str
    stages: list[tuple[str, str]]
    importance: bool = False
    gate: bool = False
    min_width: int = 0
    notes: dict[str, str] = field(default_factory=dict)


def build(records: Sequence[AnyRecord], title: str | None) -> str:
    """The page's HTML for what was read."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    sweeps = [r for r in records if isinstance(r, ComparisonRecord)]
    given = [r for r in records if isinstance(r, RunRecord)] + [run for r in sweeps for run in r.runs]
    runs = distinct(list({run.path.resolve(): run for run in given}.values()))
    attributions = [r for r in records if isinstance(r, AttributionRecord)]
    groups = grouped(runs)
    lines = lines_of(groups)
    styled = [(line.record, draw.style_of(line.group, line.record.joint)) for line in lines]
    each = [(run, look) for line, (_, look) in zip(lines, styled, strict=True) for run in line.runs]
    figures: dict[str, draw.Json] = {}
    map_of = functools.cache(importance_map)  # two sections look at each prior
    units, measured = unit_panels(figures, groups, map_of)
    sentence = headline(groups, attributions)
    context: dict[str, Any] = {
        "title": title or "holdfast report",
        "headline": sentence,
        "facts": common(runs),
        "at_once": all(group.joint for group in groups),
        "made": f"{datetime.datetime.now():%-d %B %Y, %H:%M}",
        "runs": [{"name": run.name, **style} for run, style in styled],
        "legend": [{"name": g.label, **draw.style_of(i, g.joint)} for i, g in enumerate(groups)],
        "columns": COLUMNS,
        "repeats": any(run.metrics.same_as for run in runs),
        "untested": [name for run in runs for name in run.untested],
        "rows": table(groups) if groups else [],
        "overview": _add(figures, "overview", draw.overview(groups)),
        "comparison": comparison_blocks(figures, [r.sweep for r in sweeps], groups),
        "seeds": any(len(group.runs) > 1 for group in groups),
        "firsts": _firsts(figures, groups),
        "curves": _curves(figures, styled),
        "matrices": _matrices(figures, groups),
        "weights": _weights(figures, lines, attributions, map_of),
        "units": units,
        "measured": measured,
        "agreement": agreement_block(figures, task_agreements(groups, attributions)),
        "sample": SAMPLE,
        "width": WIDTH,
        "faithfulness": _faithfulness(figures, lines, attributions),
        "moved": moved_panels(figures, each),
        "forgotten": [(i, tasks) for i, line in enumerate(lines) if (tasks := forgotten(line.runs))],
        "losses": _losses(figures, styled),
        "general": _general(figures, styled),
        "harness": [(i, _before_and_after(run)) for i, (run, _) in enumerate(styled) if run.metrics.harness],
        "costs": costs([run for run, _ in styled]),
        "details": [details(i, line.runs) for i, line in enumerate(lines)],
        "attributions": [(a, flat(a.meta.meta)) for a in attributions if a.meta],
        "column": column,
        "number": number,
        "plotly": plotly(),
        "style": (_HERE / "style.css").read_text(encoding="utf-8"),
        "script": (_HERE / "report.js").read_text(encoding="utf-8"),
    }
    for figure in figures.values():
        figure["layout"]["meta"] = describe(figure)
    context["figures"] = pack(json.dumps(figures, ensure_ascii=False, separators=(",", ":")))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("template.html").render(context)


def _add(figures: dict[str, draw.Json], key: str, figure: draw.Json | None) -> str | None:
    if figure is None:
        return None
    figures[key] = figure
    return key


Styled = Sequence[tuple[RunRecord, draw.Json]]


def _task_names(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(task for run in runs for task in run.metrics.tasks))


def _firsts(figures: dict[str, draw.Json], groups: Sequence[Group]) -> list[Panel]:
    """The first task of each stream of several tasks, drawn large."""
    streams = dict.fromkeys(tuple(run.metrics.tasks) for group in groups for run in group.runs)
    panels = []
    for s, stream in enumerate(streams):
        panel = first_task_panel(figures, f"first-{s}", groups, stream) if len(stream) > 1 else None
        if panel:
            panel.prefix = f"order {s + 1}" if len(streams) > 1 else ""
            panels.append(panel)
    return panels


def _curves(figures: dict[str, draw.Json], styled: Styled) -> list[Panel]:
    """Small multiples, one a task that isn't drawn large; runs of another stream get their own."""
    streams = dict.fromkeys(tuple(run.metrics.tasks) for run, _ in styled)
    panels = []
    for s, stream in enumerate(streams):
        members = [(run, style) for run, style in styled if tuple(run.metrics.tasks) == stream]
        for i, task in enumerate(stream):
            if f"first-{s}" in figures and i == 0:
                continue
            key = _add(figures, f"curve-{s}-{i}", draw.task_curve(i, members))
            if key:
                note = f"order {s + 1}, task {i + 1}" if len(streams) > 1 else ""
                panels.append(Panel(key, task, note=note))
    return panels


def _general(figures: dict[str, draw.Json], styled: Styled) -> list[Panel]:
    """KL to the base, on its own rows and on the new tasks'."""
    named = {
        "kl_base": "On rows that the base wrote itself",
        "kl_new": "On the task just learned",
    }
    keys = [(_add(figures, key, draw.kl_curve(key, styled)), name) for key, name in named.items()]
    return [Panel(key, name) for key, name in keys if key]


def _before_and_after(run: RunRecord) -> list[tuple[str, str, str]]:
    """lm-eval's scores, as printed: task and metric, of the base, and at the end."""
    scores = [(name, *ends(values)) for name, values in run.metrics.harness.items()]
    return [(name, number(before, 3), number(now, 3)) for name, before, now in scores]


def _losses(figures: dict[str, draw.Json], styled: Styled) -> list[Panel]:
    names = _task_names([run for run, _ in styled])
    names += list(dict.fromkeys(s.task for run, _ in styled for s in run.stages if s.task not in names))
    keys = [(_add(figures, f"loss-{i}", draw.loss_curve(name, styled)), name) for i, name in enumerate(names)]
    return [Panel(key, name) for key, name in keys if key]


def _matrices(figures: dict[str, draw.Json], groups: Sequence[Group]) -> list[Panel]:
    """One panel a method; with several seeds its selector offers their mean and each of them."""
    panels = []
    for g, group in enumerate(groups):
        prefix, choices = f"matrix-{g}-", []
        offered = [(f"mean of {len(group.runs)} runs", group.mean_matrix())] if len(group.runs) > 1 else []
        offered += [(run.name.removeprefix(f"{group.label} · "), run.metrics.matrix) for run in group.runs]
        for n, (name, rows) in enumerate(offered):
            if rows and any(a is not None for row in rows for a in row):
                run = group.runs[max(0, n - len(offered) + len(group.runs))]
                figures[f"{prefix}{n}"] = draw.matrix(rows, run.metrics.tasks, group.joint)
                choices.append((str(n), name))
        if choices:
            width = 110 + 38 * max(len(run.metrics.tasks) for run in group.runs)
            note = "" if group.finished else "unfinished"
            panels.append(Panel(prefix + choices[0][0], group.label, width, note, g, prefix, choices))
    return panels


def _weights(
    figures: dict[str, draw.Json],
    lines: Sequence[Line],
    attributions: Sequence[AttributionRecord],
    map_of: Callable[[Path], ImportanceMap],
) -> list[WeightBlock]:
    blocks = []
    for i, line in enumerate(lines):
        block = WeightBlock(f"w{i}", i, line.record.name, [])
        stages = {
            f"{f'r{r}' if r else ''}s{n}": (stage, f"{stage.task}{line.of(run)}")
            for r, run in enumerate(line.runs)
            for n, stage in enumerate(run.stages)
        }
        maps = _maps(figures, block, [(stage.prior, key) for key, (stage, _) in stages.items()], map_of)
        colour = draw.style_of(line.group, line.record.joint)["colour"]
        for key, (stage, name) in stages.items():
            gate = None
            if stage.gate is not None:
                gate = weights.gate_histogram(stage.gate, colour)
                block.notes[key] = _held(stage)
            block.gate |= bool(_add(figures, f"gate-{block.key}-{key}", gate))
            if gate or key in maps:
                block.stages.append((key, name))
        if block.stages:
            blocks.append(block)
    for i, record in enumerate(attributions):
        block = WeightBlock(f"a{i}", None, record.name, [("s0", record.name)])
        if _maps(figures, block, [(record.prior, "s0")], map_of):
            blocks.append(block)
    return blocks


def _maps(
    figures: dict[str, draw.Json],
    block: WeightBlock,
    priors: list[tuple[Path | None, str]],
    map_of: Callable[[Path], ImportanceMap],
) -> set[str]:
    """Draw a block's importance maps on one colour scale; the keys of the stages that have one."""
    maps = {key: map_of(path) for path, key in priors if path is not None}
    values = [m for heat in maps.values() for row in heat.means for m in row if m]
    if not values:
        return set()
    for key, heat in maps.items():
        figures[f"importance-{block.key}-{key}"] = weights.importance(heat, (min(values), max(values)))
        block.min_width = max(block.min_width, 90 + 30 * len(heat.modules))
    block.importance = True
    return set(maps)


def _held(stage: StageRecord) -> str:
    """One line on the mechanism, such as "gate, on update; 12 % of the weights can't move"."""
    gate = stage.gate
    if gate is None:
        return ""
    options = ", ".join(
        f"{key} {value}" for key, value in gate.mechanism.items() if key != "name" and value is not None
    )
    name = str(gate.mechanism.get("name", "protection"))
    control = f"; control: {gate.control}" if gate.control != "none" else ""
    what = "weights" if stage.prior is None or kind_of(stage.prior) == "weights" else "directions"
    held = f"; {rounded(100 * gate.held)} % of the {what} can’t move at all" if gate.held else ""
    return f"{name}{f' ({options})' if options else ''}{control}{held}"


def _faithfulness(
    figures: dict[str, draw.Json], lines: Sequence[Line], attributions: Sequence[AttributionRecord]
) -> list[Panel]:
    found: list[tuple[str, Faithfulness, int | None]] = [
        (f"{stage.faithfulness.task or stage.task}{line.of(run)}", stage.faithfulness, i)
        for i, line in enumerate(lines)
        for run in line.runs
        for stage in run.stages
        if stage.faithfulness
    ]
    found += [(a.faithfulness.task or a.name, a.faithfulness, None) for a in attributions if a.faithfulness]
    panels = []
    for n, (name, curves, run) in enumerate(found):
        figures[f"faithfulness-{n}"] = weights.faithfulness(curves)
        panels.append(Panel(f"faithfulness-{n}", name, note=faithfulness_sentence(curves), run=run))
    return panels
