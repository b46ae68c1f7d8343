"""Draw the figures of docs/results.md from results/*.json.

    python benchmarks/evidence/figures.py [OUT.html] [--pictures]

* what is kept against what is learned: a curve a method, over its strengths (validation rows, seed 0);
* how far old outputs moved against what was forgotten: each earlier task of each run held by relevance;
* the first of fifteen tasks after each later one.

`--pictures` photographs each into docs/pictures (needs playwright and an installed Chromium, in CHROMIUM or
on the PATH). The page is for the browser; the last line printed is the rank correlation of the second figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from holdfast.report.moved_figures import rank_correlation

HERE = Path(__file__).parent
PICTURES = HERE.parents[1] / "docs" / "pictures"
FOUR = ("method_base4m.yaml", "neighbours_base4m.yaml")
HELD_BY_RELEVANCE = ("inputs", "Adam on the weights")  # rows whose meter reads relevance's own C
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross")


def runs() -> list[dict[str, Any]]:
    """Every run that was recorded."""
    found: list[dict[str, Any]] = json.loads((HERE / "results" / "single_runs.json").read_text())
    return found


def frame(x: str, y: str) -> go.Figure:
    """An empty figure."""
    figure = go.Figure()
    figure.update_layout(
        width=760, height=460, template="simple_white", margin={"l": 60, "r": 20, "t": 20, "b": 55},
        showlegend=True, legend={"orientation": "h", "y": -0.18},
    )  # fmt: skip
    figure.update_xaxes(title=x, showgrid=True)
    figure.update_yaxes(title=y, showgrid=True)
    return figure


def style(i: int) -> dict[str, Any]:
    """Colour and marker, never colour alone."""
    return {"color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 10}


def curves() -> go.Figure:
    """AP against learning accuracy, a curve a method over its strengths."""
    points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for run in runs():
        row, _, setting = run["row"].partition(" · ")
        if run["grid"] in FOUR and run.get("rows") == "validation" and run["seed"] == 0:
            strength = float(setting.partition("=")[2])
            points[row].append((strength, run["metrics"]["learning_accuracy"], run["metrics"]["ap"]))
    figure = frame("learning accuracy, %", "AP, %")
    for i, (row, found) in enumerate(points.items()):
        strengths, learned, kept = zip(*sorted(found), strict=True)
        figure.add_scatter(
            x=learned, y=kept, name=row, mode="lines+markers+text", text=[f"{s:g}" for s in strengths],
            textposition="top center", marker=style(i), line={"color": style(i)["color"]},
        )  # fmt: skip
    return figure


def moved() -> tuple[go.Figure, str]:
    """Old outputs' movement against what was forgotten, of the runs whose meter reads relevance's own C."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in runs():
        row, _, setting = run["row"].partition(" · ")
        four = run["grid"] in ("method_base4m.yaml", "controls_base4m.yaml", "orders_base4m.yaml")
        if four and row in HELD_BY_RELEVANCE:
            name = ", ".join(filter(None, [row, setting, "another order" if run.get("order") else ""]))
            points[name] += [(p["moved"], p["lost"]) for p in run.get("moved", [])]
    figure = frame("old outputs moved, % (root of the later tasks' sum)", "forgotten, points")
    for i, (name, found) in enumerate(points.items()):
        x, y = zip(*found, strict=True)
        figure.add_scatter(x=x, y=y, name=name, mode="markers", marker=style(i))
    every = [point for found in points.values() for point in found]
    rho = rank_correlation(*zip(*every, strict=True))
    return figure, f"rank correlation of {len(every)} earlier tasks in {len(points)} rows: {rho:.2f}"


def first_task() -> go.Figure | None:
    """The first task's accuracy along the stream."""
    file = HERE / "results" / "first_task.json"
    if not file.exists():
        return None
    asked = json.loads(file.read_text())
    found = [run for run in asked if run["task"] == asked[0]["task"]]  # of one stream
    figure = frame(f"tasks learned ({found[0]['task']} is the first)", "accuracy, %")
    rows = list(dict.fromkeys(run["row"] for run in found))
    for run in found:
        i = rows.index(run["row"])
        figure.add_scatter(
            x=list(range(1, 1 + len(run["scores"]))), y=run["scores"],
            name=f"{run['row']}, seed {run['seed']}", mode="lines+markers", marker=style(i),
            line={"color": style(i)["color"]},
        )  # fmt: skip
    return figure


def photograph(figures: dict[str, go.Figure]) -> None:
    """A picture of each."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise SystemExit("no chromium found: install one (Debian: apt-get install chromium) or set CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--headless", "--no-sandbox"])
        for name, figure in figures.items():
            page = browser.new_page(viewport={"width": 760, "height": 460})
            page.set_content(figure.to_html(include_plotlyjs=True, config={"staticPlot": True}))
            page.wait_for_selector(".plot-container .main-svg", state="attached", timeout=120_000)
            page.locator(".plotly-graph-div").screenshot(path=PICTURES / f"{name}.png")
            page.close()
        browser.close()


def main() -> None:
    """Draw, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("evidence.html"))
    parser.add_argument("--pictures", action="store_true", help="photograph them into docs/pictures")
    arguments = parser.parse_args()
    by_drift, said = moved()
    drawn = {"evidence-curves": curves(), "evidence-moved": by_drift, "evidence-first-task": first_task()}
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=i == 0) for i, figure in enumerate(figures.values())
    ]
    arguments.out.write_text("<!doctype html><meta charset=utf-8>" + "\n".join(parts), encoding="utf-8")
    if arguments.pictures:
        photograph(figures)
    print(said)


if __name__ == "__main__":
    main()
