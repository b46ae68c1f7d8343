"""Questions without a right answer: framed as the rows that were learned, and answered greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.evaluation.answers import generate
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Example


def ask(
    model: Any,
    tokenizer: Any,
    encoder: Encoder,
    questions: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's answers, in the order of the questions.

    Parameters
    ----------
    questions : sequence of Example
        Of which prompt and tools are looked at.
    max_new_tokens : int, optional
        At most; by default ``template.max_completion_tokens``.
    """
    answers, before = [""] * len(questions), 0
    limit = max_new_tokens or encoder.template.max_completion_tokens

    def ahead(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, len(questions))

    for chat in (False, True):  # they end by different tokens
        places = [i for i, row in enumerate(questions) if encoder.asks_in_turns(row.prompt) == chat]
        if not places:
            continue
        said = generate(
            model,
            tokenizer,
            [encoder.question(questions[i]) for i in places],
            batch_size=batch_size,
            max_new_tokens=limit,
            stop_ids=encoder.stop_ids(chat=chat),
            kept_ids=encoder.text.own_ids,
            progress=ahead,
        )
        for place, answer in zip(places, said, strict=True):
            answers[place] = answer
        before += len(places)
    return answers
