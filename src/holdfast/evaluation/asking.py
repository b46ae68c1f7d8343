"""Questions without a right answer: framed as the rows that were learned, and answered greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.errors import DataError
from holdfast.evaluation.answers import generate, longer_than_context
from holdfast.models import context_length
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

    Raises
    ------
    DataError
        A question alone has more tokens than the model takes.
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
        rows = [encoder.question(questions[i]) for i in places]
        if long := longer_than_context(model, rows):
            raise DataError(
                f"{len(long)} of {len(questions)} questions, first number {places[long[0]] + 1}, have more "
                f"tokens than the model takes ({context_length(model)}). Shorten them: what they are cut to "
                f"(template.max_prompt_tokens) is {encoder.template.max_prompt_tokens} here."
            )
        said = generate(
            model,
            tokenizer,
            rows,
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
