"""What a task's answers and prompts lose on the way through tokenizer, template and context: found before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from holdfast.errors import DataError, HoldfastError
from holdfast.evaluation.answers import rooms_for_answers
from holdfast.evaluation.evaluate import (
    EncodedTask,
    EvaluationOptions,
    answers_of,
    encode_task,
    in_turns,
)
from holdfast.evaluation.scores import normalise
from holdfast.models import context_length, is_encoder_decoder
from holdfast.tasks.encode import Encoded, Encoder, Template
from holdfast.tasks.opening import opening_of
from holdfast.tasks.task import Example, Task


@dataclass
class Audit:
    """Problems, which would stop a run or make its scores worthless, and remarks."""

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def audit(
    task: Task,
    encoder: Encoder,
    model: nn.Module,
    options: EvaluationOptions,
    progress: Callable[[int], None] | None = None,
    written: bool = False,
) -> Audit:
    """Encode all of a task and see what is cut, what can't be answered, and what doesn't fit.

    Parameters
    ----------
    model : nn.Module
        Of which only the configuration is looked at.
    progress : callable, optional
        Told now and then how many rows of a part are encoded.
    written : bool
        A model is to write more such rows later: it must be told where a prompt ends.
    """
    found = Audit()
    rows: list[Encoded] = []
    for part in (task.train, task.test):
        try:
            rows += encoder.many(part, progress)
        except HoldfastError as error:
            found.problems.append(f"{task.name}: {error}")
    if found.problems or not rows:
        return found
    try:
        encoded = encode_task(task, encoder, options)
    except HoldfastError as error:
        found.problems.append(f"{task.name}: {error}")
        return found
    if written:
        try:
            opening_of(task.train, encoder, task.name)
        except HoldfastError as error:
            found.problems.append(str(error))
    _cut(task, rows, encoder.template, found)
    _control_tokens(task, encoder, found)
    _tools(task, encoder, found)
    _beginning(task, encoder, found)
    if task.metric == "options":
        _options(encoded, found)
    elif any(example.raw for example in task.test) and task.metric != "perplexity":
        found.problems.append(
            f"{task.name}: rows of running text have no answer to generate; their metric is `perplexity`, "
            f"not `{task.metric}`."
        )
    elif task.metric != "perplexity":
        _answers(encoded, encoder, found)
    _context(encoded, rows, model, found)
    return found


def require_sound(
    task: Task,
    encoder: Encoder,
    model: nn.Module,
    options: EvaluationOptions,
    tell: Callable[[str], None],
    progress: Callable[[int], None] | None = None,
    written: bool = False,
) -> None:
    """`audit` before anything is done with a task: remarks are told, problems raised.

    Raises
    ------
    DataError
        With all of them.
    """
    found = audit(task, encoder, model, options, progress, written)
    for remark in found.remarks:
        tell(remark)
    if found.problems:
        raise DataError("\n".join(found.problems))


def _cut(task: Task, rows: Sequence[Encoded], template: Template, found: Audit) -> None:
    pairs = list(zip((*task.train, *task.test), rows, strict=True))
    asked, texts = ([row for example, row in pairs if example.raw == raw] for raw in (False, True))
    cut = [row.cut for row in asked if row.cut]
    if cut:
        found.remarks.append(
            f"{task.name}: {len(cut)} of {len(asked)} prompts are longer than template.max_prompt_tokens "
            f"({template.max_prompt_tokens}); their {template.keep} tokens are kept, "
            f"up to {max(cut)} are cut."
        )
    answers = sum(row.completion_cut > 0 for row in asked)
    if answers:
        found.remarks.append(
            f"{task.name}: {answers} completions are longer than template.max_completion_tokens = "
            f"{template.max_completion_tokens} and lose their end."
        )
    lost = [row.completion_cut for row in texts if row.completion_cut]
    if lost:
        limit = template.max_prompt_tokens + template.max_completion_tokens
        tokens = sum(lost) + sum(len(row.completion_ids) for row in texts)
        found.remarks.append(
            f"{task.name}: {len(lost)} of {len(texts)} texts are longer than template.max_prompt_tokens + "
            f"template.max_completion_tokens ({limit}); what is behind that, {sum(lost)} of {tokens} tokens, "
            "is left out. Divide long texts (in a .txt file by an empty line), or raise one of the two."
        )


def _control_tokens(task: Task, encoder: Encoder, found: Audit) -> None:
    seen: Counter[str] = Counter()
    rows = 0
    for example in (*task.train, *task.test):
        tokens = {token for text in _texts(example) for token in encoder.text.controls_in(text)}
        seen.update(tokens)
        rows += bool(tokens)
    if rows:
        named = ", ".join(f"'{token}' ({count})" for token, count in seen.most_common(3))
        found.remarks.append(
            f"{task.name}: {rows} rows have the tokenizer's control tokens in their text, such as {named}; "
            "they are read as plain text."
        )


def _tools(task: Task, encoder: Encoder, found: Audit) -> None:
    rows = (*task.train, *task.test)
    unseen = sum(map(encoder.leaves_out_tools, rows))
    if unseen:
        found.remarks.append(
            f"{task.name}: {unseen} of {len(rows)} rows have tools that the model isn't shown, as no chat "
            "template frames a text. Set template.chat: true, or write them into the prompts."
        )


def _beginning(task: Task, encoder: Encoder, found: Audit) -> None:
    if encoder.begins_no_answer((*task.train, *task.test)):
        found.remarks.append(
            f"{task.name}: the tokenizer's chat template doesn't begin an answer where it is asked to "
            "(add_generation_prompt), so answers stand straight behind the user's turn. Write their "
            "beginning into the template: {% if add_generation_prompt %}...{% endif %}"
        )


def _texts(example: Example) -> Iterable[str]:
    yield example.completion
    if isinstance(example.prompt, str):
        yield example.prompt
    else:
        yield from (str(turn["content"]) for turn in example.prompt)


def _options(encoded: EncodedTask, found: Audit) -> None:
    """Options that become the same tokens always tie."""
    known: dict[tuple[int, ...], str] = {}
    for text, ids in encoded.choices:
        other = known.setdefault(tuple(ids), text)
        if other != text:
            found.problems.append(
                f"{encoded.task.name}: the options '{other}' and '{text}' are the same tokens to this model, "
                "so it can't choose between them; write them with other words."
            )


def _answers(encoded: EncodedTask, encoder: Encoder, found: Audit) -> None:
    """Test answers that can't be scored right whatever is learned."""
    task, chat = encoded.task, in_turns(encoded.task, encoder)
    gone = [e for e in task.test if not any(map(_comes_back(encoder), e.answers))]
    if gone:
        found.remarks.append(
            f"{task.name}: {len(gone)} of {len(task.test)} test answers hold characters that the tokenizer "
            f"lacks, so they can't be produced and score less, such as {gone[0].answers[0]!r:.60}."
        )
    limit = encoded.max_new_tokens
    long = [e for e in task.test if all(len(encoder.answer_ids(a, chat=chat)) > limit for a in e.answers)]
    if long:
        found.remarks.append(
            f"{task.name}: {len(long)} of {len(task.test)} test answers are longer than "
            f"evaluation.max_new_tokens = {limit}, so they can't be produced."
        )
    missing = sum(normalise(a) == "" for a in answers_of(task))
    if missing:
        found.remarks.append(f"{task.name}: {missing} right answers are empty.")


def _comes_back(encoder: Encoder) -> Callable[[str], bool]:
    tokenizer: Any = encoder.tokenizer
    known: dict[str, bool] = {}

    def comes_back(text: str) -> bool:
        if text not in known:
            ids = encoder.text.ids(text)
            known[text] = normalise(str(tokenizer.decode(ids))) == normalise(text)
        return known[text]

    return comes_back


def _context(encoded: EncodedTask, rows: list[Encoded], model: nn.Module, found: Audit) -> None:
    """Prompts and answers, generated ones too, against the positions that the model has."""
    task, limit, two_parts = encoded.task, context_length(model), is_encoder_decoder(model)
    if limit is None:
        return
    longest_answer = max((len(ids) for _, ids in encoded.choices), default=0)
    prompts = [len(row.prompt_ids) for row in rows]
    answers = [max(len(row.completion_ids), longest_answer) for row in rows]
    if two_parts:
        longest = max(*prompts, *answers)
    else:
        longest = max(p + a for p, a in zip(prompts, answers, strict=True))
    if longest > limit:
        what = "longest prompt or answer" if two_parts else "longest row (prompt and answer)"
        found.problems.append(
            f"{task.name}: the {what} has {longest} tokens, the model takes {limit}; lower "
            "template.max_prompt_tokens or template.max_completion_tokens."
        )
        return
    if not encoded.max_new_tokens or not encoded.rows:
        return
    wanted = encoded.max_new_tokens
    rooms = rooms_for_answers(model, encoded.rows, wanted)
    if short := sum(room < wanted for room in rooms):
        found.remarks.append(
            f"{task.name}: {short} of {len(encoded.rows)} test prompts leave fewer than {wanted} tokens to "
            f"their answer, the longest one {min(rooms)}: the model takes {limit} in all."
        )
