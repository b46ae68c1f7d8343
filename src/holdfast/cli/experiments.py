"""Commands that run experiments: demo, run, compare, check, report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from holdfast import world
from holdfast.cli.messages import console, told
from holdfast.cli.options import KEYS, Csv, Latex, Overrides, new_file, new_folder, write_tables
from holdfast.progress import Progress, tell


def demo_command(
    out: Annotated[Path, typer.Option(callback=new_folder, help="where runs and the report go")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Forget, and not forget: the whole job on a built-in toy suite, offline, in minutes.

    Trains a tiny Llama, then teaches it the same tasks one after another three times: plainly, with
    attribution-guided protection, and all tasks at once. Ends with a table and an HTML report.

    Example: holdfast demo --out demo --seed 0
    """
    again = shlex.join(["holdfast", "demo", "--out", str(out), "--seed", str(seed)])
    with told(f"Continue with: {again}"), Progress() as progress:
        from holdfast.demo import run_demo

        run_demo(out, seed, progress)


def run_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="what to run")],
    overrides: Overrides = None,
    csv: Csv = None,
    latex: Latex = None,
) -> None:
    """Learn a task stream under a strategy. Killed and started again, it continues.

    Examples:

      holdfast run configs/toy.yaml

      holdfast run configs/toy.yaml strategy=ewc strategy.strength=1e4 seed=1 output=runs/ewc-1

      holdfast run configs/toy.yaml strategy.importance=fisher strategy.control=permuted
    """
    again = shlex.join(["holdfast", "run", str(config), *(overrides or [])])
    with told(f"Continue with: {again}", processes=True), Progress() as progress:
        from holdfast.records import RunMetrics
        from holdfast.runner.config import load_config
        from holdfast.runner.table import harness_table, metrics_table

        loaded = load_config(config, overrides or [])  # what is wrong in it is told before the rest loads
        from holdfast.runner.loop import run

        metrics = RunMetrics.model_validate(run(loaded, progress))
        if not world.leads():
            return
        shown = metrics_table([metrics])
        write_tables(csv, latex, shown.csv(), shown.latex())
        Console().print(shown)
        if metrics.harness:
            Console().print(harness_table(metrics.harness))
        report = shlex.join(["holdfast", "report", str(loaded.output)])
        progress.say(f"Run directory: {loaded.output}   Report: {report}")


def compare_command(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="strategies, options, orders and seeds")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar=KEYS, help="such as seeds=[0,1] base.training.epochs=5"),
    ] = None,
    csv: Csv = None,
    latex: Latex = None,
) -> None:
    """Compare strategies over options, orders and seeds in one sweep. Killed and started again, it continues.

    Writes compare.json, compare.md and report.html. Exit status 1: a cell failed; the others are finished.

    Examples:

      holdfast compare configs/compare/toy.yaml

      holdfast compare configs/compare/toy.yaml seeds=[0,1] jobs=2 base.training.epochs=2 output=runs/short
    """
    again = shlex.join(["holdfast", "compare", str(grid), *(overrides or [])])
    with told(f"Continue with: {again}"), Progress() as progress:
        from holdfast.report import write_report
        from holdfast.sweep.grid import load_grid
        from holdfast.sweep.loop import compare
        from holdfast.sweep.results import table as comparison
        from holdfast.sweep.table import live_table
        from holdfast.tables import csv_text, latex_text

        plan = load_grid(grid, overrides or [])
        output = Path(plan.grid.output)
        results = compare(plan, progress)
        Console().print(live_table(results))
        failed = [f"{item.cell}: {item.reason}" for item in results.failed]
        failed += [f"{row}: none of its grid points could be chosen" for row in results.without_point]
        for line in failed:
            tell(console, f"failed: {line}", "red")
        write_tables(csv, latex, csv_text(*comparison(results, plain=True)), latex_text(*comparison(results)))
        written = [output / "compare.md"]
        if any(run.status == "finished" for row in results.rows for run in row.runs):
            written.append(write_report([output], output / "report.html", title=grid.stem))
        progress.say(f"Written: {', '.join(map(str, written))}")
        if failed:
            raise typer.Exit(1)


def check_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="what to check")],
    overrides: Overrides = None,
) -> None:
    """Find everything that can go wrong before training starts, and estimate memory and steps.

    Exit status 0: ready to run; 2: problems, all listed.

    Example: holdfast check configs/toy.yaml training.batch_size=64
    """
    with told():
        from holdfast.runner.config import load_config
        from holdfast.runner.findings import check as check_run

        findings = check_run(load_config(config, overrides or []))
        findings.print(Console())
        if findings.problems:
            raise typer.Exit(2)


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run or attribution directories")],
    out: Annotated[Path, typer.Option(callback=new_file, help="the file to write")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="heading of the page")] = None,
) -> None:
    """One HTML file, readable offline, that shows and compares runs.

    Example: holdfast report runs/toy runs/plain --out report.html
    """
    with told():
        from holdfast.report import write_report

        path = write_report(runs, out, title)
        tell(console, f"Report: {path}")
