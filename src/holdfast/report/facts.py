"""Sizes, seconds and settings of the runs, as the page prints them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from holdfast.quantities import count, duration, rough
from holdfast.report.read import RunRecord

_PHASES = (
    ("train", "training"),
    ("prior", "importance"),
    ("evaluate", "evaluation"),
    ("base", "the base as task 0"),
    ("general", "general ability"),
    ("harness", "lm-eval"),
)


def common(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What the runs have in common, for the line below the headline."""
    streams = {tuple(run.metrics.tasks) for run in runs}
    sizes = {(run.metrics.parameters, run.metrics.trainable) for run in runs}
    parameters, trainable = sizes.pop() if len(sizes) == 1 else (None, None)
    return {
        "tasks": list(streams.pop()) if len(streams) == 1 else [],
        "parameters": rough(parameters),
        "trainable": rough(trainable),
    }


def costs(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Seconds by phase; bars are scaled to the slowest run."""
    totals = [sum(s for name, s in run.metrics.seconds.items() if name != "total") for run in runs]
    longest = max([*totals, *(run.metrics.seconds.get("total", 0.0) for run in runs)], default=0.0)
    if not longest:
        return []
    rows: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        seconds = dict(run.metrics.seconds)
        total = seconds.pop("total", sum(seconds.values()))
        phases = [(key, name, seconds.get(key, 0.0)) for key, name in _PHASES]
        phases.append(("rest", "everything else", max(0.0, total - sum(s for *_, s in phases))))
        rows.append(
            {
                "run": i,
                "total": duration(total),
                "phases": [
                    {"key": key, "name": name, "text": duration(s), "width": f"{100 * s / longest:.2f}"}
                    for key, name, s in phases
                ],
            }
        )
    used = {phase["key"] for row in rows for phase in row["phases"] if phase["text"] != duration(0.0)}
    for row in rows:  # a phase that no run had is no column
        row["phases"] = [phase for phase in row["phases"] if phase["key"] in used]
    return rows


def details(index: int, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What a method was: all folders and seeds, and of the first the configuration and versions."""
    first = runs[0]
    m = first.metrics
    facts = {
        "folder": ", ".join(str(run.path) for run in runs),
        "strategy": m.strategy,
        "seed": ", ".join(str(run.metrics.seed) for run in runs if run.metrics.seed is not None) or None,
        "parameters": m.parameters,
        "trainable parameters": m.trainable,
    }
    return {
        "run": index,
        "facts": {k: count(v) if isinstance(v, int) else v for k, v in facts.items() if v is not None},
        "config": first.config,
        "environment": flat(first.environment.model_dump(exclude_unset=True)),
    }


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested JSON as dotted keys and printable values."""
    lines: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            lines |= flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines[f"{prefix}{key}"] = shown
    return lines
