"""Reads the directory of a run, an attribution or a sweep into typed records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from holdfast.errors import DataError
from holdfast.evaluation.harness import courses
from holdfast.evaluation.metrics import summarise
from holdfast.evaluation.predictions import predictions_file
from holdfast.learner.skills import read_skills
from holdfast.report.schemas import Comparison, Faithfulness, GateSummary, Metrics, Training, Units

REDO = "It may be torn or edited: run the same `holdfast run` command again to redo it."


Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Prediction:
    """One answer of the model: what it was asked, what was allowed, what it said, its score."""

    prompt: str
    expected: tuple[str, ...]
    generated: str
    score: float


@dataclass(frozen=True)
class StageRecord:
    """What a run kept of one task: everything but the name is optional."""

    task: str
    path: Path
    training: Training | None = None
    gate: GateSummary | None = None
    prior: Path | None = None
    faithfulness: Faithfulness | None = None
    units: Units | None = None

    def predictions(self, task: str) -> Iterator[Prediction]:
        """The answers to `task`'s test questions after this stage; nothing when they weren't kept.

        Raises
        ------
        DataError
            A row isn't a prediction; the message names the file and the line.
        """
        path = predictions_file(self.path, task)
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _prediction(line, path, number)


@dataclass(frozen=True)
class RunRecord:
    """One run as far as it got.

    Attributes
    ----------
    name : str
        How the report calls it; the label, until several runs share one.
    environment : dict
        Versions and machine, as the run recorded them; empty when it didn't.
    """

    path: Path
    name: str
    metrics: Metrics
    stages: tuple[StageRecord, ...] = ()
    config: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def joint(self) -> bool:
        """Whether all tasks were learned at once (the upper bound), so that nothing can be forgotten."""
        return self.metrics.strategy == "multitask"

    @property
    def prior_from(self) -> str:
        """Which model a task's prior was computed on: "sequential", "single_task", or "" if unrecorded."""
        try:
            strategy = (yaml.safe_load(self.config) or {}).get("strategy")
        except (yaml.YAMLError, AttributeError) as error:
            raise DataError(f"{self.path / 'config.yaml'}: not readable as YAML ({error}). {REDO}") from error
        return str(strategy.get("prior_from", "sequential")) if isinstance(strategy, dict) else ""

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
    meta: dict[str, Any]
    faithfulness: Faithfulness | None


@dataclass(frozen=True)
class ComparisonRecord:
    """What ``holdfast compare`` wrote: its results, and those of its runs that have any."""

    path: Path
    sweep: Comparison
    runs: tuple[RunRecord, ...]


Record = RunRecord | AttributionRecord | ComparisonRecord


def read(path: Path) -> Record:
    """Read one directory, whichever of the kinds it is.

    Raises
    ------
    DataError
        The folder is no run, no attribution and no sweep, nothing in it has been measured yet, or one of
        its files is torn; the message says which file, and what to do.
    """
    if not path.is_dir():
        raise DataError(
            f"{path}: no such folder. Give the output folder of `holdfast run` or `holdfast attribute`."
        )
    if (path / "metrics.json").is_file():
        return _read_run(path)
    if (path / "compare.json").is_file():
        return _read_comparison(path)
    if any(path.glob("tasks/*/task.json")):
        return _read_run(path, _metrics_of_skills(path))
    prior = next((p for p in (path / "prior.json", path / "prior" / "prior.json") if p.is_file()), None)
    if prior or (path / "faithfulness.json").is_file():
        return _read_attribution(path, prior)
    if any((path / part).exists() for part in ("config.yaml", "manifest.json", "tasks", "zero_shot")):
        raise DataError(
            f"{path}: this run has no metrics.json yet: it stopped before its first evaluation was saved. "
            "Run the same `holdfast run` command again; it continues where it stopped."
        )
    raise DataError(
        f"{path}: neither a run (no metrics.json) nor an attribution (no prior.json, no faithfulness.json) "
        "nor a sweep (no compare.json). "
        "Give the output folder of `holdfast run`, `holdfast attribute` or `holdfast compare`."
    )


def _metrics_of_skills(path: Path) -> Metrics:
    """A learner's folder has no ``metrics.json``: its tasks' parts say it all."""
    known = read_skills(path)
    return Metrics(
        label=path.resolve().name,
        strategy=known.strategy,
        tasks=[skill.name for skill in known.skills],
        matrix=known.matrix,
        kl_base=[skill.kl_base for skill in known.skills],
        kl_new=[skill.kl_new for skill in known.skills],
        harness=known.harness,
        **summarise(known.matrix),
    )


def _read_run(path: Path, metrics: Metrics | None = None) -> RunRecord:
    source = path / "metrics.json"
    metrics = metrics or _parse(Metrics, source)
    asked = path / "harness.json"  # of `holdfast harness`
    if not metrics.harness and asked.is_file():
        found = _json(asked)
        metrics = metrics.model_copy(update={"harness": courses([found.get("base"), found.get("now")])})
    count = len(metrics.tasks)
    rows, columns = len(metrics.matrix), sorted({len(row) for row in metrics.matrix})
    if rows != count + 1 or columns not in ([count], []):
        got = f"{rows} rows of {' or '.join(map(str, columns)) or 'no'} values"
        raise DataError(
            f"{source}: the matrix of {count} tasks needs {count + 1} rows (zero-shot first) of {count} "
            f"values, got {got}. {REDO}"
        )
    folders = sorted(p for p in (path / "tasks").glob("[0-9]*-*") if p.is_dir() and p.suffix != ".partial")
    named = [] if metrics.strategy == "multitask" else metrics.tasks  # a folder's name may be a cleaned one
    config = path / "config.yaml"
    return RunRecord(
        path=path,
        name=metrics.label,
        metrics=metrics,
        stages=tuple(_read_stage(folder, named) for folder in folders),
        config=config.read_text(encoding="utf-8").strip() if config.is_file() else "",
        environment=_json(path / "environment.json") if (path / "environment.json").is_file() else {},
    )


def _read_comparison(path: Path) -> ComparisonRecord:
    sweep = _parse(Comparison, path / "compare.json")
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
        training=_parse_if(Training, path / "training.json"),
        gate=_parse_if(GateSummary, path / "protection.json"),
        prior=prior if prior.is_file() else None,
        faithfulness=_read_faithfulness(path),
        units=_parse_if(Units, path / "units.json"),
    )


def _read_attribution(path: Path, meta: Path | None) -> AttributionRecord:
    prior = meta.with_name("prior.safetensors") if meta else None
    if prior and not prior.is_file():
        raise DataError(
            f"{prior}: missing, though {prior.with_suffix('.json').name} is there. "
            "Run the same `holdfast attribute` command again."
        )
    return AttributionRecord(path, path.name, prior, _json(meta) if meta else {}, _read_faithfulness(path))


def _read_faithfulness(folder: Path) -> Faithfulness | None:
    source = folder / "faithfulness.json"
    curves = _parse_if(Faithfulness, source)
    for who, values in curves.curves.items() if curves else ():
        if curves and len(values) != len(curves.percent):
            raise DataError(
                f"{source}: curve '{who}' has {len(values)} values for "
                f"{len(curves.percent)} percentages. {REDO}"
            )
    return curves


def _parse_if(schema: type[Schema], path: Path) -> Schema | None:
    return _parse(schema, path) if path.is_file() else None


def _parse(schema: type[Schema], path: Path) -> Schema:
    try:
        return schema.model_validate(_json(path))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors()[:5]
        )
        raise DataError(f"{path}: {problems}. {REDO}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}). {REDO}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(data).__name__}. {REDO}")
    return data


def _prediction(line: str, path: Path, number: int) -> Prediction:
    try:
        row = json.loads(line)
        asked = row["prompt"]
        return Prediction(
            prompt=asked
            if isinstance(asked, str)
            else "\n".join(f"{m['role']}: {m['content']}" for m in asked),
            expected=tuple(str(answer) for answer in row["expected"]),
            generated=str(row["generated"]),
            score=float(row["score"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}:{number}: not a prediction (needs prompt, expected, generated, score): {error}. {REDO}"
        ) from error
