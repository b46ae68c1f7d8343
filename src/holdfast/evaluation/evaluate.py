"""The score of a model on a task, with every prediction kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from holdfast.config import Options
from holdfast.evaluation.generate import generate, rank_options
from holdfast.evaluation.scores import SCORES
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Example, Task


class EvaluationOptions(Options):
    """How a model is tested after each task."""

    batch_size: int = Field(64, ge=1)
    max_new_tokens: int | None = Field(
        None, ge=1, description="default: the longest training completion of the task, plus two tokens"
    )
    scope: Literal["all", "needed"] = Field(
        "all",
        description="all: every task after every stage; needed: only what AP, FWT, BWT and learning accuracy "
        "need (half the time on four tasks; gaps in the matrix)",
    )
    zero_shot: bool = Field(True, description="score every task before any training (row 0 of the matrix)")


@dataclass(frozen=True)
class TaskScore:
    """Mean score (0 to 100) and the predictions behind it."""

    score: float
    predictions: list[dict[str, Any]]


def answer_budget(task: Task, encoder: Encoder, options: EvaluationOptions) -> int:
    """How many tokens an answer may have; learned from training rows only."""
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    return max((len(encoder(e).completion_ids) for e in task.train), default=32) + 2


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    encoder: Encoder,
    *,
    options: EvaluationOptions,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Generate an answer for every test row and score it by the task's metric."""
    rows = encoder.many(task.test)
    if task.metric == "options":
        choices = [(text, encoder(Example("?", text)).completion_ids) for text in task.options]
        answers = rank_options(
            model, tokenizer, rows, choices, batch_size=options.batch_size, progress=progress
        )
    else:
        answers = generate(
            model,
            tokenizer,
            rows,
            batch_size=options.batch_size,
            max_new_tokens=answer_budget(task, encoder, options),
            progress=progress,
        )
    score = SCORES[task.metric]
    predictions: list[dict[str, Any]] = [
        {
            "prompt": example.prompt
            if isinstance(example.prompt, str)
            else [dict(m) for m in example.prompt],
            "expected": list(example.answers),
            "generated": answer,
            "score": score(answer, example.answers),
        }
        for example, answer in zip(task.test, answers, strict=True)
    ]
    return TaskScore(sum(p["score"] for p in predictions) / len(predictions), predictions)
