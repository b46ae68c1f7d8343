"""Reads the directory of a run, an attribution or a sweep into typed records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from holdfast.config import recorded_in
from holdfast.errors import DataError
from holdfast.evaluation.predictions import read_predictions
from holdfast.folder import CONFIG, ENVIRONMENT, MANIFEST, PARTIAL, Folder
from holdfast.learner.asked import with_asked
from holdfast.learner.config import STAGES
from holdfast.learner.skills import read_skills
from holdfast.places import near
from holdfast.records import (
    Comparison,
    Environment,
    Faithfulness,
    Prediction,
    PriorMeta,
    ProtectionSummary,
    Record,
    RunMetrics,
    TrainingLog,
    UnitScores,
)

Kind = TypeVar("Kind", bound=Record)


@dataclass(frozen=True)
class StageRecord:
    """What a run kept of one task: everything but the name is optional."""

    task: str
    path: Path
    training: TrainingLog | None = None
    gate: ProtectionSummary | None = None
    prior: Path | None = None
    faithfulness: Faithfulness | None = None
    units: UnitScores | None = None

    def predictions(self, task: str) -> Iterator[Prediction]:
        """The answers to `task`'s test questions after this stage; nothing when they weren't kept.

        Raises
        ------
        DataError
            A row isn't a prediction; the message names the file and the line.
        """
        return read_predictions(self.path, task)


_METHOD = ("model", "template", "training", "strategy", "replay", "protect_base")  # what makes a method


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value, default=str, ensure_ascii=False).strip('"')


@dataclass(frozen=True)
class RunRecord:
    """One run as far as it got.

    Attributes
    ----------
    name : str
        How the report calls it; the label, until several runs share one.
    config : str
        ``config.yaml`` as it stands there; empty where there is none.
    environment : Environment
        Versions and machine, as the run recorded them; empty when it didn't.
    """

    path: Path
    name: str
    metrics: RunMetrics
    stages: tuple[StageRecord, ...] = ()
    config: str = ""
    environment: Environment = field(default_factory=Environment)

    @property
    def joint(self) -> bool:
        """Whether all tasks were learned at once (the upper bound), so that nothing can be forgotten."""
        return self.metrics.strategy == "multitask"

    @cached_property
    def told(self) -> dict[str, Any]:
        """What is in ``config.yaml``; nothing where there is none."""
        path = self.path / CONFIG
        told = recorded_in(self.config, path) if self.config else {}
        if not isinstance(told, dict):
            raise DataError(f"{path}: no mapping of sections ({type(told).__name__}). {RunMetrics.again()}")
        return told

    @cached_property
    def setting(self) -> dict[str, str]:
        """What makes its method: model, training, strategy and replay, key to value; empty if unrecorded."""
        return dict(_flat({key: self.told[key] for key in _METHOD if self.told.get(key)}, ""))

    @property
    def prior_from(self) -> str:
        """Which model a task's prior was computed on: "sequential", "single_task", or "" if unrecorded."""
        strategy = self.told.get("strategy")
        return str(strategy.get("prior_from", "sequential")) if isinstance(strategy, dict) else ""

    @property
    def untested(self) -> list[str]:
        """Tasks that were learned and that no row tests; they count in no mean."""
        columns = enumerate(zip(*self.metrics.matrix, strict=True))
        names = [self.metrics.tasks[i] for i, scores in columns if all(a is None for a in scores)]
        return names if self.metrics.finished and self.seen else []

    @property
    def seen(self) -> int:
        """How many tasks were learned and tested."""
        rows = [j for j, row in enumerate(self.metrics.matrix) if any(a is not None for a in row)]
        return rows[-1] if rows else 0


@dataclass(frozen=True)
class AttributionRecord:
    """What ``holdfast attribute`` wrote: a prior and, when asked for, its faithfulness."""

    path: Path
    name: str
    prior: Path | None
    meta: PriorMeta | None
    faithfulness: Faithfulness | None


@dataclass(frozen=True)
class ComparisonRecord:
    """What ``holdfast compare`` wrote: its results, and those of its runs that have any."""

    path: Path
    sweep: Comparison
    runs: tuple[RunRecord, ...]


AnyRecord = RunRecord | AttributionRecord | ComparisonRecord


def read(path: Path) -> AnyRecord:
    """Read one directory, whichever of the kinds it is.

    Raises
    ------
    DataError
        The folder is no run, no attribution and no sweep, nothing in it has been measured yet, or one of
        its files is torn; the message says which file, and what to do.
    """
    if not path.is_dir():
        what = "a file, not a folder" if path.exists() else "no such folder"
        raise DataError(
            f"{path}: {what}. Give the output folder of `holdfast run`, `learn`, `attribute` or `compare`."
            f"{'' if path.exists() else near(path)}"
        )
    if (path / "metrics.json").is_file():
        return _read_run(path)
    if (path / "compare.json").is_file():
        return _read_comparison(path)
    if any(file.parent.suffix != PARTIAL for file in path.glob("tasks/*/task.json")):
        return _read_run(path, _metrics_of_skills(path))
    prior = next((p for p in (path / "prior.json", path / "prior" / "prior.json") if p.is_file()), None)
    if prior or (path / "faithfulness.json").is_file():
        return _read_attribution(path, prior)
    if any((path / part).exists() for part in (CONFIG, MANIFEST, "tasks", "zero_shot")):
        raise DataError(
            f"{path}: this run has no metrics.json yet: it stopped before its first evaluation was saved. "
            "Run the same `holdfast run` (or `holdfast learn`) command again; it continues where it stopped."
        )
    raise DataError(
        f"{path}: neither a run (no metrics.json) nor an attribution (no prior.json, no faithfulness.json) "
        "nor a sweep (no compare.json). "
        "Give the output folder of `holdfast run`, `holdfast attribute` or `holdfast compare`."
    )


def _metrics_of_skills(path: Path) -> RunMetrics:
    """A learner's folder has no ``metrics.json``: its tasks' parts say it all."""
    known = read_skills(path)
    return RunMetrics(
        label=path.resolve().name,
        strategy=known.strategy,
        tasks=[skill.name for skill in known.skills],
        matrix=known.matrix,
        kl_base=[skill.kl_base for skill in known.skills],
        kl_new=[skill.kl_new for skill in known.skills],
        harness=known.harness,  # `holdfast harness` included
        **known.metrics(),
    )


def _read_run(path: Path, metrics: RunMetrics | None = None) -> RunRecord:
    of_run = metrics is None
    metrics = metrics or RunMetrics.read(path / "metrics.json")
    folders = [path / part for part in Folder(path).parts(STAGES)]
    named = [] if metrics.strategy == "multitask" else metrics.tasks  # a folder's name may be a cleaned one
    stages = tuple(_read_stage(folder, named) for folder in folders)
    if of_run:
        learned = [stage.task for stage in stages] if named else len(stages)
        metrics = metrics.model_copy(update={"harness": with_asked(metrics.harness, path, learned)})
    config = path / CONFIG
    return RunRecord(
        path=path,
        name=metrics.label,
        metrics=metrics,
        stages=stages,
        config=_text(config) if config.is_file() else "",
        environment=_read_if(Environment, path / ENVIRONMENT) or Environment(),
    )


def _read_comparison(path: Path) -> ComparisonRecord:
    sweep = Comparison.read(path / "compare.json")
    folders = [path / run.path for row in sweep.rows for run in row.runs]
    return ComparisonRecord(
        path, sweep, tuple(_read_run(f) for f in folders if (f / "metrics.json").is_file())
    )


def _read_stage(path: Path, tasks: list[str]) -> StageRecord:
    prior = path / "prior" / "prior.safetensors"
    index, _, name = path.name.partition("-")
    return StageRecord(
        task=dict(enumerate(tasks, 1)).get(int(index), name) if index.isdigit() else name,
        path=path,
        training=_read_if(TrainingLog, path / "training.json"),
        gate=_read_if(ProtectionSummary, path / "protection.json"),
        prior=prior if prior.is_file() else None,
        faithfulness=_read_if(Faithfulness, path / "faithfulness.json"),
        units=_read_if(UnitScores, path / "units.json"),
    )


def _read_attribution(path: Path, meta: Path | None) -> AttributionRecord:
    prior = meta.with_name("prior.safetensors") if meta else None
    if prior and not prior.is_file():
        raise DataError(
            f"{prior}: missing, though {prior.with_suffix('.json').name} is there. "
            "Run the same `holdfast attribute` command again."
        )
    return AttributionRecord(
        path=path,
        name=path.name,
        prior=prior,
        meta=PriorMeta.read(meta) if meta else None,
        faithfulness=_read_if(Faithfulness, path / "faithfulness.json"),
    )


def _read_if(record: type[Kind], path: Path) -> Kind | None:
    return record.read(path) if path.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}). {RunMetrics.again()}") from error
