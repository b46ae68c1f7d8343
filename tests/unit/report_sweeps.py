"""A synthetic sweep in the layout that ``holdfast compare`` writes, for the report's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_runs import stream_matrix, write_json, write_run

from holdfast.evaluation.compare import METRICS, difference, mean_and_spread
from holdfast.evaluation.metrics import summarise

LINES = (
    ("plain", {}, 0.5),
    ("ewc", {"strategy.strength": 10.0}, 0.7),
    ("ewc", {"strategy.strength": 100.0}, 0.9),
)


def write_sweep(path: Path, failed: bool = False) -> Path:
    """Two rows, one with a grid of two strengths, two seeds each."""
    rows: list[dict[str, Any]] = []
    scores: dict[str, Any] = {}
    for name, point, kept in LINES:
        label = " · ".join([name, *(f"strength={v:g}" for v in point.values())])
        runs = []
        for seed in range(2):
            matrix = stream_matrix(90 + 2 * seed, kept)
            scores.setdefault(label, {})[seed] = summarise(matrix)
            folder = Path("runs", label, f"seed-{seed}")
            write_run(path / folder, label, matrix=matrix, seed=seed, artefacts=False)
            runs.append({"seed": seed, "order": "", "path": str(folder), "status": "finished"})
        row = {"row": name, "label": label, "point": point, "strategy": "sequential", "runs": runs}
        rows.append(row | {"command": f"holdfast run x.yaml label={name}"})
    for row in rows:
        values = {key: {s: m[key] for s, m in scores[row["label"]].items()} for key in METRICS}
        theirs = {key: {s: m[key] for s, m in scores["plain"].items()} for key in METRICS}
        row["scores"] = {key: mean_and_spread(list(values[key].values())).model_dump() for key in METRICS}
        alone = row["label"] == "plain"
        found = {key: difference(values[key], theirs[key]).model_dump() for key in METRICS}
        row["differences"] = None if alone else found
    curve = [
        {"value": row["point"]["strategy.strength"], **{k: row["scores"][k]["mean"] for k in METRICS}}
        for row in rows[1:]
    ]
    write_json(
        path / "compare.json",
        {
            "grid": "grid.yaml",
            "seeds": [0, 1],
            "orders": {},
            "reference": "plain",
            "finished": not failed,
            "rows": rows,
            "choice": None,
            "curves": [
                {"row": "ewc", "split": "test", "key": "strategy.strength", "fixed": {}, "points": curve}
            ],
            "failed": [{"cell": "<b>x</b>, seed 0", "path": "x", "reason": "no [room]"}] if failed else [],
        },
    )
    return path
