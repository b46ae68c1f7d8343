"""One run: a loop over a learner, on a stream that is known beforehand; resumable at any point."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast import world
from holdfast.environment import describe_environment
from holdfast.errors import RunDirectoryError
from holdfast.evaluation.metrics import summarise
from holdfast.evaluation.predictions import file_safe
from holdfast.folder import PARTIAL, in_order
from holdfast.learner import Learner
from holdfast.learner.asked import along_the_way
from holdfast.learner.base_task import BASE
from holdfast.learner.known import read_about
from holdfast.models import load_model, onto_gpu
from holdfast.progress import Progress, stoppable
from holdfast.records import RunMetrics, StageMetrics, TrainingLog
from holdfast.runner.config import RunConfig, Scope
from holdfast.runner.directory import RunDirectory
from holdfast.runner.rows import digests, keep_rows, of_other_rows
from holdfast.strategies import Stage, build_strategy
from holdfast.tasks import build_stream, toy_tokenizer
from holdfast.tasks.task import Task

ZERO_SHOT = "zero_shot"
LATER = "later"  # what a stage's model says to tasks that came into the order after it


def run(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run a configuration to its end and return the contents of ``metrics.json``.

    Called again after a kill, it continues where the directory stands; the weights and metrics at the
    end are those of an uninterrupted run, bit for bit, on the same machine and number of threads. Called with
    more tasks behind those of ``tasks.order``, it goes on to these, and ends as if it had had them from the
    start.

    Raises
    ------
    HoldfastError
        Any of its subclasses; what was finished stays on disk.
    """
    world.start()
    if config.threads is not None:  # the learner sets them too: here for what is recorded of the environment
        torch.set_num_threads(config.threads)
    with RunDirectory.open(config, describe_environment(config.seed)) as directory, stoppable():
        if progress is not None:
            return _Run(config, directory, progress).to_the_end()
        with Progress(quiet=True) as silent:
            return _Run(config, directory, silent).to_the_end()


class _Run:
    def __init__(self, config: RunConfig, directory: RunDirectory, progress: Progress) -> None:
        self.config, self.directory, self.progress = config, directory, progress
        self.stream = build_stream(config.tasks, config.seed, progress.remark)
        self.stages = build_strategy(config.strategy).stages(self.stream)
        self.names = [Learner.part(stage) for stage in self.stages]

    def to_the_end(self) -> dict[str, Any]:
        config, directory = self.config, self.directory
        done = directory.completed(self.names)
        for note in directory.notes:
            self.progress.say(note)
        if done:
            self.progress.say(f"{directory.path}: continuing after {done} of {len(self.names)} stages.")
        learner = self._learner()
        if len(learner.learned) > len(self.stages):
            further = ", ".join(learner.learned[len(self.stages) :])
            raise RunDirectoryError(
                f"{directory.path}: more was learned here than this configuration has ({further}). Take it "
                f"back with `holdfast skills {shlex.quote(str(directory.path))} --undo`, or give this run a "
                "directory with output=DIR."
            )
        self._check_same_stream(learner.learned)
        learner.look(task for stage in self.stages[len(learner.learned) :] for task in stage.tasks)
        if config.evaluation.zero_shot:
            self._ask_the_base(learner)
        self._ask_what_came_later(learner)
        for stage in self.stages[len(learner.learned) :]:
            self._learn(learner, stage)
            self._write_metrics(learner)
        return self._write_metrics(learner)

    def _check_same_stream(self, learned: Sequence[str]) -> None:
        """See that what was learned here, or begun, is what the configuration's data are now.

        Raises
        ------
        RunDirectoryError
            Other tasks, or other rows of one; nothing is changed.
        """
        path = self.directory.path
        planned = [stage.name for stage in self.stages[: len(learned)]]
        if planned != list(learned):
            raise RunDirectoryError(
                f"{path}: learned here: {', '.join(learned)}; this configuration begins with "
                f"{', '.join(planned)}. Give the order as it was in tasks.order, with new tasks behind it, "
                "or another directory with output=DIR."
            )
        for problem in of_other_rows(path, digests(self.stream.tasks, self.stream.tasks)):
            raise RunDirectoryError(
                f"{problem} Bring these back, or give this run a directory of its own with output=DIR."
            )

    def _learner(self, after: int | None = None) -> Learner:
        """The learner as the directory has it; or as it was after so many stages."""
        config = self.config
        model, tokenizer = load_model(config.model, config.seed, toy_tokenizer)
        onto_gpu(model)
        return Learner(model, tokenizer, config, folder=self.directory, progress=self.progress, after=after)

    def _learn(self, learner: Learner, stage: Stage) -> None:
        description = f"{stage.index + 1}/{len(self.stages)} learn {stage.name}"
        started = time.perf_counter()
        tested = self._tested_after(stage.index)
        with learner.stage(stage, tested, description) as learning:
            keep_rows(learning.folder, stage.tasks, tested)
            learning.train()
        record = _records(self.directory.path, self.names[stage.index])[0]
        asked = [score for t in stage.tasks if (score := record.scores.get(t.name)) is not None]
        mean = f"score {sum(asked) / len(asked):.1f}, " if asked else ""
        away = "" if record.kl_base is None else f"KL to the base {record.kl_base:.3f}, "
        self.progress.say(
            f"  {self.config.title}: learned {stage.name} ({stage.index + 1}/{len(self.stages)}), "
            f"{mean}{away}{time.perf_counter() - started:.0f} s"
        )

    def _tested_after(self, index: int) -> Sequence[Task]:
        return tested_after(self.stages, index, self.config.evaluation.scope)

    def _ask_the_base(self, learner: Learner) -> None:
        """Zero-shot, where it isn't there as it was written; no weights depend on it."""
        path = self.directory.path / ZERO_SHOT
        problem = self.directory.problem(ZERO_SHOT) if path.exists() else None
        if problem is not None:
            self.progress.say(f"{path}: {problem}; the base is asked again.")
            self.directory.remove(ZERO_SHOT)
        if not path.exists():
            base = self._learner(0) if learner.learned else learner
            with self.directory.part(ZERO_SHOT) as folder:
                self._ask(base, self.stream.tasks, folder, ZERO_SHOT, "zero-shot")

    def _ask_what_came_later(self, learner: Learner) -> None:
        """Ask earlier models the tasks that have come into the order since, which they were never asked."""
        rows: list[tuple[int, str, Sequence[Task]]] = []
        if self.config.evaluation.zero_shot:
            rows.append((0, ZERO_SHOT, self.stream.tasks))
        rows += [
            (index + 1, self.names[index], self._tested_after(index)) for index in range(len(learner.learned))
        ]
        for stages, part, tasks in rows:
            asked = scores_of(self.directory.path, part)
            missing = [task for task in tasks if task.name not in asked]
            if missing and stages and self.directory.thinned(part):
                names = ", ".join(task.name for task in missing)
                gone = "its weights are not kept (keep: last)"
                self.progress.say(f"{part}: {gone}, so it isn't asked {names}.")
            elif missing:
                then = self._learner(stages)
                for task in missing:
                    with self.directory.part(later(part, task.name)) as folder:
                        self._ask(then, [task], folder, part, f"{task.name} after {part.rpartition('/')[2]}")

    def _ask(
        self, learner: Learner, tasks: Sequence[Task], folder: Path, stage: str, description: str
    ) -> None:
        started = time.perf_counter()
        keep_rows(folder, (), tasks)
        scores = learner.evaluate(tasks, folder, description)
        seconds = {"evaluate": time.perf_counter() - started}
        StageMetrics(stage=stage, scores=scores, seconds=seconds).write(folder / "metrics.json")

    def _write_metrics(self, learner: Learner) -> dict[str, Any]:
        metrics = collect_metrics(
            self.config, self.stream.names, self.stages, self.names, self.directory.path
        )
        metrics["parameters"] = sum(p.numel() for p in learner.model.parameters())
        metrics["knows_task"] = learner.state.strategy.needs_task_identity
        metrics["rehearses"] = self.config.rehearses
        metrics["memory"] = self.config.memory
        first = TrainingLog.read(self.directory.path / self.names[0] / "training.json")
        metrics["trainable"] = first.trained  # none in a run of an earlier version
        RunMetrics(**metrics).write(self.directory.path / "metrics.json")
        return metrics


def tested_after(stages: Sequence[Stage], index: int, scope: Scope) -> list[Task]:
    """Which tasks are tested after a stage; after the last one all of them."""
    final = index == len(stages) - 1
    first, behind = {
        "all": (0, len(stages)),
        "seen": (0, index + 1),
        "needed": (index, index + 2),
        "last": (index, index),
    }[scope]
    asked = stages if final else stages[first:behind]
    return [task for stage in asked for task in stage.tasks]


def later(part: str, task: str) -> str:
    """Where the answers to a task stand that came into the order after a stage was done."""
    return f"{LATER}/{part.rpartition('/')[2]}/{file_safe(task)}"


def later_parts(path: Path) -> list[str]:
    """All such parts that are committed."""
    asked = in_order((path / LATER).glob("*"))
    found = [file for part in asked for file in sorted(part.glob("*/metrics.json"))]
    return [str(f.parent.relative_to(path)) for f in found if not f.parent.name.endswith(PARTIAL)]


def scores_of(path: Path, part: str) -> dict[str, float | None]:
    """The scores of a stage's model, those of later questions included; nothing where it isn't done."""
    found: dict[str, float | None] = {}
    for record in _records(path, part):
        found.update(record.scores)
    return found


def _records(path: Path, part: str) -> list[StageMetrics]:
    name = part.rpartition("/")[2]
    parts = [part, *(p for p in later_parts(path) if p.split("/")[1] == name)]
    files = [path / p / "metrics.json" for p in parts]
    return [StageMetrics.read(file) for file in files if file.exists()]


def collect_metrics(
    config: RunConfig, tasks: Sequence[str], stages: Sequence[Stage], names: Sequence[str], path: Path
) -> dict[str, Any]:
    """Put the stages' scores into the matrix ``a[j][i]`` and compute the metrics of what is there.

    A stage that trains several tasks at once stands in the row of its last task; rows between are empty.
    """
    position = {name: i for i, name in enumerate(tasks, start=1)}
    empty: list[float | None] = [None] * len(tasks)
    matrix: list[list[float | None]] = [list(empty) for _ in range(len(tasks) + 1)]
    seconds = {"train": 0.0, "prior": 0.0, "evaluate": 0.0}
    general: dict[str, list[float | None]] = {"kl_base": [], "kl_new": []}
    rows = {0: (ZERO_SHOT, set(tasks))}
    for index, (stage, name) in enumerate(zip(stages, names, strict=True)):
        # a stage that was the last one of a shorter stream was asked more
        asked = {task.name for task in tested_after(stages, index, config.evaluation.scope)}
        rows[max(position[task.name] for task in stage.tasks)] = (name, asked)
    for row, (part, asked) in rows.items():
        if (path / part / "metrics.json").exists():
            scores = scores_of(path, part)
            matrix[row] = [scores.get(task) if task in asked else None for task in tasks]
            for record in _records(path, part):
                for key, value in record.seconds.items():
                    seconds[key] = seconds.get(key, 0.0) + value
    told = read_about(path / BASE).get("seconds")
    if told is not None:
        seconds["base"] = float(told)
    same_as = {task.name: task.same_as for stage in stages for task in stage.tasks if task.same_as}
    for record in _firsts(path, names):
        for key in general:
            general[key].append(getattr(record, key))
    return {
        "label": config.title,
        "strategy": config.strategy.name,
        "tasks": list(tasks),
        "same_as": same_as,
        "matrix": matrix,
        **summarise(matrix, [same_as.get(task, task) for task in tasks]),
        **(general if config.evaluation.general else {}),
        **({"harness": along_the_way(_firsts(path, names))} if config.evaluation.harness else {}),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "seed": config.seed,
        "finished": matrix[-1] != empty,
    }


def _firsts(path: Path, names: Sequence[str]) -> list[StageMetrics]:
    return [record for name in names for record in _records(path, name)[:1]]
