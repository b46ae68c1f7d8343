"""The score of a model on a task, with every prediction kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from holdfast.config import Options
from holdfast.evaluation.answers import Greedy, generate, rank_options, total_log_likelihoods
from holdfast.evaluation.scores import SCORES, sari, sources_of
from holdfast.records import Prediction
from holdfast.tasks.encode import Encoded, Encoder
from holdfast.tasks.task import Task


class EvaluationOptions(Options):
    """How a model is asked."""

    batch_size: int = Field(64, ge=1)
    max_new_tokens: int | None = Field(
        None, ge=1, description="default: the longest answer of the task, plus two tokens"
    )


@dataclass(frozen=True)
class TaskScore:
    """Mean score (0 to 100) and the predictions behind it; for perplexity 100 / that of all tokens."""

    score: float
    predictions: list[Prediction]


@dataclass(frozen=True)
class EncodedTask:
    """What the test of a task needs as token ids: made once, asked after every stage.

    Attributes
    ----------
    task : Task
    rows : list of Encoded
        The test rows, in their order.
    choices : list of (str, list of int)
        For the metric ``options``: each allowed answer with the tokens of its framed form; else empty.
    max_new_tokens : int
        How long a generated answer may be, in tokens; 0 where none is generated.
    stop_ids : list of int
        The tokens that end an answer.
    kept_ids : frozenset of int
        Special tokens that answers of this task hold.
    """

    task: Task
    rows: list[Encoded]
    choices: list[tuple[str, list[int]]]
    max_new_tokens: int
    stop_ids: list[int]
    kept_ids: frozenset[int] = frozenset()


def encode_task(task: Task, encoder: Encoder, options: EvaluationOptions) -> EncodedTask:
    """Encode a task's test rows and what bounds its answers."""
    ranked, chat = task.metric == "options", in_turns(task, encoder)
    told = ranked or task.metric == "perplexity"  # nothing is generated
    answers = {} if told else {text: encoder.answer_ids(text, chat=chat) for text in answers_of(task)}
    own = encoder.text.own_ids
    return EncodedTask(
        task,
        encoder.many(task.test),
        [(text, encoder.answer_ids(text, chat=chat)) for text in task.options] if ranked else [],
        0 if told else answer_budget(answers, options),
        encoder.stop_ids(chat=chat),
        frozenset(own & {token for ids in answers.values() for token in ids}) if own else frozenset(),
    )


def in_turns(task: Task, encoder: Encoder) -> bool:
    """Whether the tokenizer's chat template frames the prompts."""
    return any(encoder.asks_in_turns(example.prompt) for example in task.test)


def answers_of(task: Task) -> set[str]:
    """Every text that is trained on or counts as right; a classification has few."""
    return {e.completion for e in task.train} | {answer for e in task.test for answer in e.answers}


def answer_budget(answers: Mapping[str, Sequence[int]], options: EvaluationOptions) -> int:
    """How many tokens a generated answer may have: those of the longest, and two.

    Test answers count, so that none is cut; a longer budget changes no answer that ends before.
    """
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    return max((len(ids) for ids in answers.values()), default=32) + 2


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    encoder: Encoder,
    *,
    options: EvaluationOptions,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Generate an answer for every test row and score it by the task's metric.

    To test one task again and again, encode it once with `encode_task` and call `evaluate_encoded`.
    """
    encoded = encode_task(task, encoder, options)
    return evaluate_encoded(model, tokenizer, encoded, batch_size=options.batch_size, progress=progress)


def evaluate_encoded(
    model: Any,
    tokenizer: Any,
    encoded: EncodedTask,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    engine: Greedy | None = None,
) -> TaskScore:
    """As `evaluate_task`, of a task that `encode_task` has encoded.

    With `engine` its answers are scored, where answers are generated, in place of the model's own.
    """
    task = encoded.task
    if task.metric == "perplexity":
        return _perplexities(model, tokenizer, encoded, batch_size, progress)
    if task.metric == "options":
        answers = rank_options(
            model, tokenizer, encoded.rows, encoded.choices, batch_size=batch_size, progress=progress
        )
    else:
        answers = generate(
            model,
            tokenizer,
            encoded.rows,
            batch_size=batch_size,
            max_new_tokens=encoded.max_new_tokens,
            stop_ids=encoded.stop_ids,
            kept_ids=encoded.kept_ids,
            progress=progress,
            engine=engine,
        )
    scores = _scores(task, answers)
    predictions = [
        Prediction(
            prompt=example.prompt if isinstance(example.prompt, str) else [dict(m) for m in example.prompt],
            expected=list(example.answers),
            generated=answer,
            score=score,
        )
        for example, answer, score in zip(task.test, answers, scores, strict=True)
    ]
    return TaskScore(sum(p.score for p in predictions) / len(predictions), predictions)


def _perplexities(
    model: Any,
    tokenizer: Any,
    encoded: EncodedTask,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> TaskScore:
    """100 / the perplexity of the true answers, end token included: 100 is certainty, as with other scores.

    That of all is over all tokens alike, as is usual, and so no mean of the rows'.
    """
    rows = encoded.rows
    totals = total_log_likelihoods(model, tokenizer, rows, batch_size=batch_size, progress=progress)
    predictions = []
    for example, row, total in zip(encoded.task.test, rows, totals, strict=True):
        mean = total / len(row.completion_ids)
        predictions.append(
            Prediction(
                prompt=example.prompt
                if isinstance(example.prompt, str)
                else [dict(m) for m in example.prompt],
                expected=list(example.answers),
                generated=f"perplexity {math.exp(min(-mean, 700)):.2f}",
                score=100 * math.exp(mean),
            )
        )
    tokens = sum(len(row.completion_ids) for row in rows)
    return TaskScore(100 * math.exp(sum(totals) / tokens), predictions)


def _scores(task: Task, answers: Sequence[str]) -> list[float]:
    """Of each test row's answer."""
    rows = list(zip(answers, task.test, strict=True))
    if task.metric != "sari":
        return [SCORES[task.metric](answer, example.answers) for answer, example in rows]
    prompts = [
        example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])
        for example in task.test
    ]
    sources = sources_of(prompts)
    return [
        sari(answer, example.answers, source) for (answer, example), source in zip(rows, sources, strict=True)
    ]
