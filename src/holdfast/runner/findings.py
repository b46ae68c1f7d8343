"""What can go wrong, found before training: data, lengths, model, prior; and what a run will cost."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from holdfast.errors import HoldfastError
from holdfast.evaluation.audit import audit
from holdfast.folder import CONFIG
from holdfast.hold.cost import trained_numbers
from holdfast.learner.askable import check_askable
from holdfast.models import is_encoder_decoder, load_model, weights_of
from holdfast.progress import tell
from holdfast.quantities import count, mebibytes
from holdfast.runner.config import RunConfig
from holdfast.runner.directory import RunDirectory
from holdfast.runner.table import Rows
from holdfast.storage import not_a_folder
from holdfast.strategies import Strategy, build_strategy
from holdfast.tasks import Encoder, inspect_stream, load_task, read_otherwise, toy_tokenizer
from holdfast.tasks.memory import Rehearsal, WritingOptions, stand_in
from holdfast.tasks.options import trained_on
from holdfast.tasks.task import Example, Task, TaskStream
from holdfast.training.options import TrainingOptions


@dataclass
class Findings:
    """Problems that stop a run, remarks that don't, and the estimate.

    Attributes
    ----------
    estimate : list of (what, how much)
        Parameters, memory in MiB, and optimizer steps.
    """

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    estimate: list[tuple[str, str]] = field(default_factory=list)

    def print(self, console: Console) -> None:
        """Show the findings."""
        for problem in self.problems:
            tell(console, f"problem: {problem}", "red")
        for remark in self.remarks:
            tell(console, f"note: {remark}")
        if self.estimate:
            console.print(Rows(("", ""), self.estimate))
        if not self.problems:
            tell(console, "Ready to run.", "green")


def check(config: RunConfig, directory: bool = True) -> Findings:
    """Look at data, model, template, output and prior of a valid configuration, without training.

    Parameters
    ----------
    directory : bool
        Look at the output directory too.
    """
    findings = Findings()
    model = tokenizer = None
    stream: TaskStream | None
    stream, data = inspect_stream(config.tasks, config.seed)
    if data.found:  # what could be read is not what would run
        findings.problems += data.told
        findings.remarks += data.advice
        stream = None
    findings.remarks += data.left_out
    if stream is not None and config.tasks.test_split == "validation":
        counts = sorted({len(task.test) for task in stream})
        rows = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        findings.remarks.append(
            f"scores are of validation rows, {rows} a task from the training data that training leaves out "
            "(tasks.test_split); the test rows are not read."
        )
    try:
        model, tokenizer = load_model(config.model, config.seed, toy_tokenizer)
    except HoldfastError as error:
        findings.problems.append(str(error))
    for found_out in (config.training.check_machine, partial(check_askable, config, model, tokenizer)):
        try:
            found_out()
        except HoldfastError as error:
            findings.problems.append(str(error))
    if directory:
        _check_output(config, findings)
    given: list[Task] = []  # rows of files beside the stream's
    if config.protect_base is not None and config.protect_base.general is not None:
        try:
            given.append(
                replace(load_task(config.protect_base.general), name="protect_base.general", test=())
            )
        except HoldfastError as error:
            findings.problems.append(f"protect_base.general: {error}")
    strategy, fits = build_strategy(config.strategy), model is not None
    if model is not None:
        try:
            strategy.check(model)
        except HoldfastError as error:
            fits = False
            findings.problems.append(str(error))
    if stream is not None and tokenizer is not None:
        try:
            _check_tasks(config, stream.tasks, given, model, tokenizer, strategy, findings)
        except HoldfastError as error:
            findings.problems.append(str(error))
    if model is not None and config.training.trainer == "sft" and is_encoder_decoder(model):
        findings.problems.append("training.trainer: 'sft' trains causal models only; use 'auto'.")
    if fits and stream is not None:
        try:
            _estimate(config, model, stream, strategy, findings)
        except HoldfastError as error:  # of files that are read to count rows
            findings.problems.append(str(error))
    return findings


def _check_output(config: RunConfig, findings: Findings) -> None:
    output = Path(config.output)
    try:
        if why := not_a_folder(output):
            findings.problems.append(f"output: {why}.")
        elif different := RunDirectory.hindrances(config):
            findings.problems.append(
                f"output: {output} holds a run with another configuration; different: "
                f"{', '.join(different)}. Give output=DIR."
            )
        elif (output / CONFIG).exists():
            findings.remarks.append(f"output: {output} exists; the run there is continued.")
        nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not os.access(nearest, os.W_OK):
            findings.problems.append(f"output: {nearest} may not be written (Permission denied).")
    except OSError as error:
        findings.problems.append(f"output: {output} can't be used ({error.strerror or error}).")


def _check_tasks(
    config: RunConfig,
    tasks: Sequence[Task],
    given: Sequence[Task],
    model: Any,
    tokenizer: Any,
    strategy: Strategy,
    findings: Findings,
) -> None:
    encoder = Encoder(tokenizer, config.template, encoder_decoder=is_encoder_decoder(model))
    every = (*tasks, *given)
    for number, task in enumerate(every):
        findings.remarks += read_otherwise(task)
        findings.remarks += trained_on(every[: number + 1], task)
        written = config.writes and number < len(tasks)
        found = audit(task, encoder.apart(), model, config.evaluation, written=written)
        findings.problems += found.problems
        findings.remarks += found.remarks
    if not findings.problems:
        strategy.check_tasks(tasks, encoder)


def _estimate(
    config: RunConfig, model: Any, stream: TaskStream, strategy: Strategy, findings: Findings
) -> None:
    estimate = strategy.estimate(model, stream)
    total, taken = weights_of(model)
    learned = trained_numbers(model) if estimate.trained is None else estimate.trained
    size = torch.finfo(model.dtype).bits // 8
    states = {"adamw": 2, "sgd": 0, "adafactor": 0}[config.training.optimizer]
    findings.estimate += [
        ("parameters", f"{count(total)} ({count(learned)} trained)"),
        ("weights", mebibytes(taken)),
        ("gradients", mebibytes(learned * size)),
        ("optimizer state", mebibytes(learned * size * states)),
    ]
    if config.training.loss.name == "kl_to_base" and config.model.lora is None:
        findings.estimate.append(("copy of the base (training.loss: kl_to_base)", mebibytes(taken)))
    if getattr(config.replay or config.strategy, "targets", "text") == "logits":
        findings.estimate.append(("copy of what is trained (targets: logits)", mebibytes(learned * size)))
    for cost in estimate.costs:
        findings.estimate.append((cost.what, mebibytes(cost.size)))
        findings.remarks += [cost.note] if cost.note else []
    if config.model.lora is None and not any(p.requires_grad for p in model.parameters()):
        findings.problems.append("model.trainable: this model has no linear maps inside transformer blocks.")
    rows = _rows(config, stream, strategy)
    steps = [_steps(config.training, number) if strategy.trains else 0 for number in rows]
    findings.estimate.append(
        ("optimizer steps", f"{count(sum(steps))} ({', '.join(map(str, steps))} by stage)")
    )
    further = [_steps(config.training, *training) for training in estimate.further]
    if further:
        said = f"{count(sum(further))} ({', '.join(map(str, further))})"
        findings.estimate.append(("further optimizer steps", said))
    if config.protect_base is not None and config.protect_base.general is None:
        most = config.protect_base.rows * (config.protect_base.writing or WritingOptions()).tries
        findings.estimate.append(("rows that the base writes first", f"up to {count(most)}"))
    tests = sum(len(task.test) for task in stream)
    rounds = len(steps) + config.evaluation.zero_shot
    findings.estimate.append(
        ("answers generated", f"up to {count(tests * rounds)} ({count(tests)} in each of {rounds} rounds)")
    )


def _steps(options: TrainingOptions, rows: int, epochs: float | None = None) -> int:
    batches = math.ceil(rows / options.batch_size)
    epoch = max(math.ceil(batches / options.gradient_accumulation), 1)
    if epochs is None:
        return options.max_steps or math.ceil(epoch * options.epochs)
    return math.ceil(epoch * epochs)


def _rows(config: RunConfig, stream: TaskStream, strategy: Strategy) -> Iterator[int]:
    """How many rows each stage trains on, replayed ones included: a memory is filled as in the run."""
    rehearsal = strategy.rehearsal if config.replay is None else Rehearsal(config.replay)
    for stage in strategy.stages(stream):
        examples: Sequence[Example] = [example for task in stage.tasks for example in task.train]
        if rehearsal is not None:
            examples = rehearsal.mixed(examples, config.seed)
            rehearsal.learned(stage.tasks, config.seed, stand_in)
        yield len(examples) + strategy.extra_rows(stage)
