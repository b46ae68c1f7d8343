"""``holdfast demo``: a base is trained, then one task stream is learned three ways and compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.config import validate
from holdfast.progress import Progress
from holdfast.quantities import number
from holdfast.records import RunMetrics
from holdfast.report import write_report
from holdfast.runner import RunConfig, run
from holdfast.runner.table import metrics_table
from holdfast.tasks.toy import BASE_TASKS, BASE_TRAINING, SIZE, STREAM_TASKS, STREAM_TRAINING, ToyTraining


def _loop(training: ToyTraining) -> dict[str, Any]:
    return {key: value for key, value in asdict(training).items() if key != "train_rows"}


BASE: dict[str, Any] = {
    "label": "base",
    "model": {"toy": True, "hidden": 128, "layers": 4, "trainable": "all"},
    "tasks": {
        "source": "toy",
        "order": list(BASE_TASKS),
        "size": SIZE,
        "train_rows": BASE_TRAINING.train_rows,
        "test_rows": 50,
    },
    "training": _loop(BASE_TRAINING),
    "strategy": "multitask",
    "evaluation": {"zero_shot": False},
}
STREAM: dict[str, Any] = {
    "tasks": {
        "source": "toy",
        "order": list(STREAM_TASKS),
        "size": SIZE,
        "train_rows": STREAM_TRAINING.train_rows,
        "test_rows": 100,
    },
    "training": _loop(STREAM_TRAINING),
}
WAYS: dict[str, Any] = {
    "sequential": {"name": "sequential"},
    # the pull and the coordinates are the defaults of this importance
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
        runs.append(RunMetrics.model_validate(run(_config(values, out / name, seed), progress)))
    report = write_report([out / name for name in WAYS], out / "report.html", title="holdfast demo")
    Console().print(metrics_table(runs))
    plain, held = runs[0], runs[1]
    lost, kept = (number(None if run.bwt is None else -run.bwt, 0) for run in (plain, held))
    progress.say(
        f"Plain fine-tuning ends {lost} points below what it had learned; "
        f"with protection it is {kept}.\nReport: {report.resolve()}"
    )
    return report


def _config(values: dict[str, Any], output: Path, seed: int) -> RunConfig:
    return validate(
        RunConfig, {**values, "output": str(output), "seed": seed, "threads": 1}, source="holdfast demo"
    )
