"""``holdfast demo``: a base is trained, then one task stream is learned three ways and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.config import validate
from holdfast.progress import Progress
from holdfast.report import write_report
from holdfast.runner import RunConfig, run
from holdfast.runner.table import metrics_table
from holdfast.tasks import BASE_TASKS, STREAM_TASKS

BASE: dict[str, Any] = {
    "label": "base",
    "model": {"toy": True, "hidden": 128, "layers": 4},
    "tasks": {"source": "toy", "order": list(BASE_TASKS), "train_rows": 1500, "test_rows": 50},
    "training": {"epochs": 4, "batch_size": 32, "learning_rate": 1e-3},
    "strategy": "multitask",
}
STREAM: dict[str, Any] = {
    "tasks": {"source": "toy", "order": list(STREAM_TASKS), "train_rows": 1000, "test_rows": 100},
    "training": {"epochs": 4, "batch_size": 32, "learning_rate": 1e-3},
}
WAYS: dict[str, Any] = {
    "sequential": {"name": "sequential"},
    "attribution": {"name": "attribution"},
    "multitask": {"name": "multitask"},
}


def run_demo(out: Path, seed: int, progress: Progress) -> Path:
    """Run the demo into a folder and return the path of its report; continues where it was stopped.

    Raises
    ------
    HoldfastError
        As `holdfast.run` and `holdfast.report.write_report`.
    """
    progress.say("Training a tiny Llama on the base tasks: " + ", ".join(BASE_TASKS))
    run(_config(BASE, out / "base", seed), progress)
    base = out / "base" / "tasks" / "01-joint" / "model"
    runs = []
    for name, strategy in WAYS.items():
        progress.say(f"Learning {' → '.join(STREAM_TASKS)}: {name}")
        values = {**STREAM, "label": name, "strategy": strategy, "model": {"path": str(base)}}
        runs.append(run(_config(values, out / name, seed), progress))
    report = write_report([out / name for name in WAYS], out / "report.html", title="holdfast demo")
    Console().print(metrics_table(runs))
    plain, held = runs[0], runs[1]
    progress.say(
        f"Plain fine-tuning ends {-plain['bwt']:.0f} points below what it had learned; "
        f"with protection it is {-held['bwt']:.0f}.\nReport: {report.resolve()}"
    )
    return report


def _config(values: dict[str, Any], output: Path, seed: int) -> RunConfig:
    return validate(RunConfig, {**values, "output": str(output), "seed": seed}, source="holdfast demo")
