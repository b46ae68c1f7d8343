"""From a row of a data set (a mapping) to an Example, with every fault noted where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from holdfast.config import Options
from holdfast.tasks.problems import Problems
from holdfast.tasks.task import Example, Message

ROLES = ("system", "developer", "user", "assistant", "tool")


class Columns(Options):
    """Which column of a data set holds what.

    `prompt` and `completion` name a column, or combine several: ``"{premise}\\n{hypothesis}"``. With
    `messages` the last assistant message is the completion and the ones before it are the prompt.
    """

    prompt: str | None = Field(
        default=None, description="a column, or a text with {column} in it; default: prompt"
    )
    completion: str | None = Field(
        default=None, description="a column, or a text with {column} in it; default: completion"
    )
    references: str | None = Field(
        default=None, description="a column with all right answers; default: references, where there is one"
    )
    messages: str | None = Field(
        default=None, description="a column of chat messages, instead of the two above"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("give either `messages`, or `prompt` and `completion`")
        return self


STANDARD = Columns()


class _Fault(Exception):
    """What is wrong with a row; caught where the row's place is known."""


def to_example(row: object, where: str, problems: Problems, columns: Columns = STANDARD) -> Example | None:
    """Make an example of a row, or note what is wrong with it and return None.

    Parameters
    ----------
    row : mapping
        ``{"prompt", "completion"[, "references"]}`` or ``{"messages"}``, under the names in `columns`.
        Prompt and completion may be texts or, as in TRL, lists of chat messages.
    where : str
        The row's place, such as ``train.jsonl:17``.
    """
    try:
        return _example(row, columns)
    except _Fault as fault:
        problems.add_row(where, str(fault))
        return None


def as_examples(rows: Iterable[Example | Mapping[str, Any]], columns: Columns = STANDARD) -> list[Example]:
    """Examples from anything that yields rows: a list of dicts, a ``datasets.Dataset``, examples themselves.

    Raises
    ------
    DataError
        A row is malformed, or there is none; all of them are named.
    """
    problems, examples = Problems(), []
    for number, row in enumerate(rows, start=1):
        example = row if isinstance(row, Example) else to_example(row, f"row {number}", problems, columns)
        if example is not None:
            examples.append(example)
    if not examples and not problems.found:
        problems.add("data", "there are no rows")
    problems.raise_if_any()
    return examples


def _example(row: object, columns: Columns) -> Example:
    if not isinstance(row, Mapping):
        raise _Fault(
            f"a row must be an object such as {{'prompt': ..., 'completion': ...}}, got {_kind(row)}"
        )
    messages = columns.messages or ("messages" if columns == STANDARD and _is_chat(row) else None)
    if messages is not None:
        turns = _messages(_get(row, messages), messages)
        if turns[-1]["role"] != "assistant":
            raise _Fault(f"'{messages}' must end with the assistant's answer, got role '{turns[-1]['role']}'")
        if len(turns) == 1:
            raise _Fault(f"'{messages}' has an answer, but no message before it")
        prompt: str | tuple[Message, ...] = turns[:-1]
        completion = turns[-1]["content"]
    else:
        asked, answered = columns.prompt or "prompt", columns.completion or "completion"
        prompt = _prompt(_get(row, asked), asked)
        completion = _completion(_get(row, answered), answered)
    if not completion.strip():
        raise _Fault("empty completion: give the row an answer or leave it out")
    return Example(prompt, completion, _references(row, columns))


def _is_chat(row: Mapping[str, Any]) -> bool:
    return "messages" in row and "prompt" not in row


def _get(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a text with {column} in it."""
    present = ", ".join(map(str, row)) or "(none)"
    if column in row:
        return row[column]
    if "{" not in column:
        raise _Fault(f"no column '{column}'; columns of this row: {present}")
    try:
        return column.format_map(
            {key: _text(value, str(key)) for key, value in row.items() if f"{{{key}}}" in column}
        )
    except (KeyError, IndexError, ValueError) as error:
        raise _Fault(
            f"the text {column!r} can't be filled ({error}); columns of this row: {present}"
        ) from error


def _text(value: object, column: str) -> str:
    """A text; whole numbers count as texts, since tables (CSV) read '1' as a number."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _Fault(f"'{column}' must be a text, got {_kind(value)}")


def _prompt(value: object, column: str) -> str | tuple[Message, ...]:
    return _messages(value, column) if isinstance(value, list | tuple) else _text(value, column)


def _completion(value: object, column: str) -> str:
    if not isinstance(value, list | tuple):
        return _text(value, column)
    turns = _messages(value, column)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise _Fault(f"'{column}' must be a text or one assistant message, got {len(turns)} messages")
    return turns[0]["content"]


def _messages(value: object, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _Fault(f"'{column}' must be a list of messages, got {_kind(value)}")
    for turn in value:
        known = isinstance(turn, Mapping) and all(isinstance(turn.get(k), str) for k in ("role", "content"))
        if not known:
            raise _Fault(
                f"a message in '{column}' must be {{'role': text, 'content': text}}, got {turn!r:.60}"
            )
        if turn["role"] not in ROLES:
            raise _Fault(f"unknown role '{turn['role']}' in '{column}'; allowed: {', '.join(ROLES)}")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def _references(row: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    if columns.references is None and "references" not in row:
        return ()
    column = columns.references or "references"
    value = _get(row, column)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise _Fault(f"'{column}' must be a list of texts, got {_kind(value)}")
    return tuple(value)


def _kind(value: object) -> str:
    names = {
        type(None): "nothing (null)",
        bool: "a boolean",
        float: "a fraction",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return (
        f"{names.get(type(value), type(value).__name__)} ({value!r:.40})"
        if value is not None
        else names[type(None)]
    )
