"""One run: for each stage prepare, train, consolidate, evaluate, record; resumable at any point."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from holdfast.evaluation.evaluate import EncodedTask, encode_task, evaluate_encoded
from holdfast.evaluation.metrics import summarise
from holdfast.evaluation.predictions import file_safe, write_predictions
from holdfast.models import is_encoder_decoder, load_model, load_weights, save_model
from holdfast.progress import Progress, stoppable
from holdfast.runner.config import RunConfig
from holdfast.runner.directory import RunDirectory
from holdfast.runner.environment import describe_environment
from holdfast.storage import write_json, write_tensors
from holdfast.strategies import Context, Stage, Strategy, build_strategy
from holdfast.tasks import Encoder, build_stream, toy_tokenizer
from holdfast.tasks.memory import Rehearsal
from holdfast.tasks.task import Example, Task
from holdfast.training.loop import save_record, train
from holdfast.training.steps import Interventions

ZERO_SHOT = "zero_shot"


def run(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run a configuration to its end and return the contents of ``metrics.json``.

    Called again after a kill, it continues where the directory stands; the weights and metrics at the
    end are those of an uninterrupted run, bit for bit, on the same machine and number of threads.

    Raises
    ------
    HoldfastError
        Any of its subclasses; what was finished stays on disk.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with RunDirectory.open(config, describe_environment(config.seed)) as directory, stoppable():
        if progress is not None:
            return _Run(config, directory, progress).to_the_end()
        with Progress(quiet=True) as silent:
            return _Run(config, directory, silent).to_the_end()


class _Run:
    def __init__(self, config: RunConfig, directory: RunDirectory, progress: Progress) -> None:
        self.config, self.directory, self.progress = config, directory, progress
        self.stream = build_stream(config.tasks, config.seed)
        self.strategy: Strategy = build_strategy(config.strategy)
        self.replay = None if config.replay is None else Rehearsal(config.replay)
        self.stages = self.strategy.stages(self.stream)
        self.names = [
            f"tasks/{i:02d}-{file_safe(stage.name)}" for i, stage in enumerate(self.stages, start=1)
        ]
        self.model, self.tokenizer = load_model(config.model, config.seed, toy_tokenizer)
        if torch.cuda.is_available():
            self.model.cuda()
        self.encoder = Encoder(
            self.tokenizer, config.template, encoder_decoder=is_encoder_decoder(self.model)
        )
        self._tests: dict[str, EncodedTask] = {}  # by task: its test rows are asked after every stage

    def to_the_end(self) -> dict[str, Any]:
        config, directory = self.config, self.directory
        context = Context(
            model=self.model,
            tokenizer=self.tokenizer,
            encoder=self.encoder,
            stream=self.stream,
            seed=config.seed,
            progress=self.progress,
            folder=directory.path,
            base_model=lambda: load_model(config.model, config.seed, toy_tokenizer)[0].to(self.model.device),
            fit=self._fit_aside,
        )
        self.strategy.check(self.model)
        self.strategy.prepare(context)
        self.model = context.model  # a strategy may have wrapped it
        before = [ZERO_SHOT] if config.evaluation.zero_shot else []
        done = directory.completed([*before, *self.names])
        for note in directory.notes:
            self.progress.say(note)
        if done:
            self.progress.say(
                f"{directory.path}: continuing after {done} of {len(before + self.names)} stages."
            )
        if before and done == 0:
            self._zero_shot()
        learned = max(done - len(before), 0)
        if learned:
            self._restore(directory.path / self.names[learned - 1])
        for index in range(learned, len(self.stages)):
            self._learn(index, context)
            self._write_metrics()
        return self._write_metrics()

    def _zero_shot(self) -> None:
        with self.directory.stage(ZERO_SHOT) as folder:
            started = time.perf_counter()
            scores = self._evaluate(folder, "zero-shot", self.stream.tasks)
            seconds = {"evaluate": time.perf_counter() - started}
            write_json(folder / "metrics.json", {"stage": ZERO_SHOT, "scores": scores, "seconds": seconds})

    def _restore(self, folder: Path) -> None:
        load_weights(self.model, folder / "model")
        file = folder / "strategy.safetensors"
        tensors = load_file(file) if file.exists() else {}
        self.strategy.load_state_dict(tensors, json.loads((folder / "strategy.json").read_text()))
        if self.replay is not None:
            self.replay.memory.load_state_dict(json.loads((folder / "replay.json").read_text()))

    def _learn(self, index: int, context: Context) -> None:
        stage, name, strategy = self.stages[index], self.names[index], self.strategy
        seed = self.config.seed * 1000 + index + 1  # each stage has its own, so a resumed run draws the same
        seconds: dict[str, float] = {}
        with self.directory.stage(name) as folder:
            context.folder = folder
            started = time.perf_counter()
            strategy.begin(context, stage)
            examples = strategy.examples(stage)
            if self.replay is not None:
                examples = self.replay.mixed(examples, self.config.seed)
            record = train(
                self.model,
                self.encoder.many(examples),
                self.config.training,
                tokenizer=self.tokenizer,
                folder=folder / "checkpoints",
                seed=seed,
                interventions=_interventions(strategy),
                progress=self.progress,
                description=f"{index + 1}/{len(self.stages)} learn {stage.name}",
            )
            save_record(record, folder / "training.json")
            seconds["train"] = time.perf_counter() - started
            started = time.perf_counter()
            torch.manual_seed(seed)  # a resumed training leaves the generator elsewhere
            strategy.end(context, stage)
            if self.replay is not None:
                self.replay.learned(stage.tasks, self.config.seed)
            seconds["prior"] = time.perf_counter() - started
            started = time.perf_counter()
            scores = self._evaluate(folder, f"after {stage.name}", self._tested_after(index))
            seconds["evaluate"] = time.perf_counter() - started
            write_json(folder / "metrics.json", {"stage": stage.name, "scores": scores, "seconds": seconds})
            self._save_state(folder)
        mean = sum(scores[t.name] for t in stage.tasks) / len(stage.tasks)
        self.progress.say(
            f"  {self.config.title}: learned {stage.name} ({index + 1}/{len(self.stages)}), "
            f"score {mean:.1f}, {seconds['train'] + seconds['prior'] + seconds['evaluate']:.0f} s"
        )

    def _save_state(self, folder: Path) -> None:
        shutil.rmtree(folder / "model", ignore_errors=True)  # a killed attempt may have left a part of it
        save_model(self.model, self.tokenizer, folder / "model")
        tensors, values = self.strategy.state_dict()
        if tensors:
            write_tensors(folder / "strategy.safetensors", tensors)
        write_json(folder / "strategy.json", values)
        if self.replay is not None:
            write_json(folder / "replay.json", self.replay.memory.state_dict())

    def _fit_aside(
        self,
        model: Any,
        examples: Sequence[Example],
        description: str,
        interventions: Interventions | None = None,
        epochs: float | None = None,
    ) -> None:
        options = self.config.training
        if epochs is not None:
            options = options.model_copy(update={"epochs": epochs, "max_steps": None})
        folder = self.directory.path / "aside"  # not resumable by itself: its stage is redone as a whole
        shutil.rmtree(folder, ignore_errors=True)
        train(
            model,
            self.encoder.many(examples),
            options,
            tokenizer=self.tokenizer,
            folder=folder / "checkpoints",
            seed=self.config.seed,
            interventions=interventions,
            progress=self.progress,
            description=description,
        )
        shutil.rmtree(folder, ignore_errors=True)

    def _tested_after(self, index: int) -> Sequence[Task]:
        """Which tasks are tested after a stage: under ``scope: needed`` those just learned, and the next."""
        if self.config.evaluation.scope == "all" or index == len(self.stages) - 1:
            return self.stream.tasks
        return [*self.stages[index].tasks, *self.stages[index + 1].tasks]

    def _evaluate(self, folder: Path, description: str, tasks: Sequence[Task]) -> dict[str, float]:
        scores: dict[str, float] = {}
        rows = sum(len(task.test) for task in tasks)
        with self.progress.bar(f"test {description}", total=rows) as bar:
            done = 0
            for task in tasks:
                scores[task.name] = self._score(task, folder, lambda n, _, before=done: bar(before + n))
                done += len(task.test)
        return scores

    def _score(self, task: Task, folder: Path, progress: Any) -> float:
        known = task.name if self.strategy.needs_task_identity else None
        model = self.strategy.route(self.model, known)
        options = self.config.evaluation
        if task.name not in self._tests:
            self._tests[task.name] = encode_task(task, self.encoder, options)
        result = evaluate_encoded(
            model, self.tokenizer, self._tests[task.name], batch_size=options.batch_size, progress=progress
        )
        write_predictions(folder, task.name, result.predictions)
        return result.score

    def _write_metrics(self) -> dict[str, Any]:
        metrics = collect_metrics(
            self.config, self.stream.names, self.stages, self.names, self.directory.path
        )
        metrics["parameters"] = sum(p.numel() for p in self.model.parameters())
        metrics["knows_task"] = self.strategy.needs_task_identity
        metrics["rehearses"] = self.config.rehearses
        first = json.loads((self.directory.path / self.names[0] / "training.json").read_text())
        metrics["trainable"] = first.get("trained")  # none in a run of an earlier version
        write_json(self.directory.path / "metrics.json", metrics)
        return metrics


def _interventions(strategy: Strategy) -> Interventions:
    """The strategy's verbs for the training loop; one that it doesn't have costs nothing there."""

    def own(verb: str) -> Any:
        overridden = getattr(type(strategy), verb) is not getattr(Strategy, verb)
        return getattr(strategy, verb) if overridden else None

    return Interventions(
        attach=strategy.attach,
        watch=own("watch"),
        penalty=own("penalty"),
        observe=own("observe"),
        state=own("stage_state_dict"),
        load_state=own("load_stage_state_dict"),
    )


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
    folders = {0: path / ZERO_SHOT}
    for stage, name in zip(stages, names, strict=True):
        folders[max(position[task.name] for task in stage.tasks)] = path / name
    for row, folder in folders.items():
        file = folder / "metrics.json"
        if file.exists():
            record = json.loads(file.read_text())
            matrix[row] = [record["scores"].get(task) for task in tasks]
            for key, value in record["seconds"].items():
                seconds[key] += value
    return {
        "label": config.title,
        "strategy": config.strategy.name,
        "tasks": list(tasks),
        "matrix": matrix,
        **summarise(matrix),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "seed": config.seed,
        "finished": matrix[-1] != empty,
    }
