"""From rows of a data set (mappings) to Examples, with every fault noted where it stands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from holdfast.config import Options, half_character, validate
from holdfast.errors import ConfigError, DataError
from holdfast.tasks.chat import answers_in, function_in, is_learned, read_answer, read_messages, unread_in
from holdfast.tasks.files import as_written
from holdfast.tasks.problems import NoColumn, Problems, RowFault, kind_of
from holdfast.tasks.task import Example, Message

ANSWERS = ("response", "answer")  # what a completion is called where exactly one of them is there
_REMARKS = ("id", "meta", "source", "url", "title", "date")  # columns that say where a text is from
_BESIDE = ("references", "tools", *_REMARKS)  # columns that any form may have


class Columns(Options):
    """Which column of a data set holds what.

    `prompt` and `completion` name a column, or combine several: ``"{premise}\\n{hypothesis}"``. With
    `messages` the last assistant message is the completion and the ones before it are the prompt; with
    ``turns="all"`` each of the assistant's is, in a row of its own.
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
    text: str | None = Field(
        default=None, description="a column of running text, instead of all of these: rows without a question"
    )

    turns: Literal["last", "all"] = Field(
        default="last",
        description="of chats. last: the last answer is learned; all: each answer that has a message before "
        "it, as a row of its own, but those of weight 0",
    )

    @property
    def unnamed(self) -> bool:
        """Whether no column is named, so that its names say what a row is."""
        return self.model_copy(update={"turns": STANDARD.turns}) == STANDARD

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("give either `messages`, or `prompt` and `completion`")
        if self.turns == "all" and any(c is not None for c in (self.prompt, self.completion, self.text)):
            raise ValueError(
                "`turns: all` is of chat messages; leave it out, or the other columns but `messages`"
            )
        others = (self.prompt, self.completion, self.references, self.messages)
        if self.text is not None and any(other is not None for other in others):
            raise ValueError("`text` is for rows without a question; leave out the other columns")
        return self

    @classmethod
    def of(cls, assignments: Iterable[str]) -> Columns:
        """Columns from texts such as ``prompt=question``; what is behind the sign is taken to the letter.

        Raises
        ------
        ConfigError
            One has no sign or no such key, or they don't go together.
        """
        values: dict[str, str] = {}
        for text in assignments:
            key, sign, name = text.partition("=")
            if not sign or not name or key in values:
                what = "is given twice" if key in values else "must be KEY=COLUMN, such as prompt=question"
                raise ConfigError(f"--column: '{text}' {what}. Keys: {', '.join(cls.model_fields)}.")
            values[key] = name
        return validate(cls, values, "--column")


STANDARD = Columns()
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """A way in which data sets write a row.

    Attributes
    ----------
    name : str
        How it is said; "" for prompt and completion, and for what the user has set.
    read : callable
        From a row to (prompt, completion); raises `RowFault`.
    uses : frozenset of str
        The columns that it reads, beside references and tools.
    raw : bool
        Whether rows are running text (`Example.raw`).
    chat : str, optional
        The column of messages.
    """

    name: str
    read: Callable[[Row], tuple[str | tuple[Message, ...], str]]
    uses: frozenset[str] = frozenset()
    raw: bool = False
    chat: str | None = None


def form_of(row: object, columns: Columns = STANDARD) -> Form | None:
    """The form of a row: what `columns` says, or else what the names of its columns say, if they do."""
    if columns.messages is not None:
        return _chat(columns.messages, "")
    if columns.text is not None:
        return _running(columns.text, "")
    if not columns.unnamed:
        return _pair(columns.prompt or "prompt", columns.completion or "completion", "")
    if not isinstance(row, Mapping):
        return None
    if "completion" in row:
        return PLAIN
    answers = [name for name in ANSWERS if name in row]
    if "prompt" in row and len(answers) == 1:
        return _pair("prompt", answers[0], f"prompt and {answers[0]}")
    if "prompt" not in row and "messages" in row:
        return _chat("messages", "chat messages")
    if "prompt" not in row and "conversations" in row:
        return _chat("conversations", "ShareGPT: conversations")
    if "instruction" in row and "output" in row:
        name, uses = "Alpaca: instruction, a line break and input; output", ("instruction", "input", "output")
        return Form(name, _alpaca, frozenset(uses))
    if "text" in row and not set(row) - {"text", *_REMARKS}:  # beside a label it would be a prompt
        return _running("text", "running text")
    return None


def to_example(row: object, where: str, problems: Problems, columns: Columns = STANDARD) -> Example | None:
    """Make an example of a row, or note what is wrong with it and return None.

    Parameters
    ----------
    row : mapping
        ``{"prompt", "completion"[, "references"]}`` or ``{"messages"}``, under the names in `columns`; or,
        without `columns`, any form that `form_of` knows. Prompt and completion may be texts or, as in TRL,
        lists of chat messages.
    where : str
        The row's place, such as ``train.jsonl:17``.
    """
    return _to_example(row, where, problems, columns, form_of(row, columns) or PLAIN)


def _to_example(row: object, where: str, problems: Problems, columns: Columns, form: Form) -> Example | None:
    own = form_of(row, columns)
    try:
        if own is not None and own.name != form.name:
            names = [each.name or "prompt and completion" for each in (own, form)]
            raise RowFault(
                f"written as {names[0]}, and the rows before it as {names[1]}: a file has one form"
            )
        example = _example(row, columns, form)
        return replace(example, chat=where) if columns.turns == "all" else example
    except RowFault as fault:
        problems.add_row(where, fault)
        return None


def to_examples(
    rows: Iterable[tuple[str, object]], problems: Problems, columns: Columns = STANDARD
) -> tuple[list[Example], str]:
    """The examples of one file's rows, given with their places, and the form in which they are written.

    A file has one form, that of its first row that has any: a row in another one is a fault. Its name is ""
    for prompt and completion; where a form was recognised and leaves columns unread, these are told with it.
    """
    placed = list(rows)
    form = _form_of_all(placed, columns)
    each = _by_answer(placed, form, problems, columns)
    found = (_to_example(row, where, problems, columns, form) for where, row in each)
    unread = _unread(form, [row for _, row in placed if isinstance(row, Mapping)], columns)
    name = form.name or ("chat messages" if form.chat else "prompt and completion")
    told = f"{name}; columns that are not read: {', '.join(unread)}"
    return [example for example in found if example is not None], told if unread else form.name


def _form_of_all(placed: Sequence[tuple[str, object]], columns: Columns) -> Form:
    forms = (form_of(row, columns) for _, row in placed)
    return next((form for form in forms if form is not None), PLAIN)


def _by_answer(
    placed: Sequence[tuple[str, object]], form: Form, problems: Problems, columns: Columns
) -> list[tuple[str, object]]:
    """Each chat up to each of its answers, where `columns` asks for all; references are of the last one."""
    if columns.turns == "last" or not placed:
        return list(placed)
    if form.chat is None:
        problems.add(
            "columns.turns",
            f"'all' is of rows of chat messages, and these are {form.name or 'prompt and completion'}: "
            "leave it out",
        )
        return list(placed)
    found: list[tuple[str, object]] = []
    for where, row in placed:
        turns = row.get(form.chat) if isinstance(row, Mapping) else None
        if isinstance(row, Mapping) and isinstance(turns, list | tuple):
            alone, ends = {**row, columns.references or "references": None}, answers_in(turns)
            found += [(where, {**alone, form.chat: turns[:end]}) for end in ends]
            if ends and not is_learned(turns[-1]):
                continue
        found.append((where, row))
    return found


def _unread(form: Form, rows: Sequence[Row], columns: Columns) -> list[str]:
    """Columns that hold something and that nothing is made of, such as a system message beside a prompt.

    Where columns are named, the others are left out on purpose; keys of messages nobody names.
    """
    held = {key: None for row in rows for key in row if _holds(row[key])} if columns.unnamed else {}
    of_rows = [str(key) for key in held if str(key).strip() and key not in form.uses and key not in _BESIDE]
    inside = (f"{name}.{key}" for row in rows for name in form.uses for key in unread_in(row.get(name)))
    return [*of_rows, *(key for key in dict.fromkeys(inside) if key.partition(".")[2] not in _REMARKS)]


def as_examples(
    rows: Iterable[Example | Mapping[str, Any]], columns: Columns = STANDARD, *, needed: bool = True
) -> list[Example]:
    """Examples from anything that yields rows: a list of dicts, a ``datasets.Dataset``, examples themselves.

    Parameters
    ----------
    needed : bool
        Whether there must be some.

    Raises
    ------
    DataError
        A row is malformed, or there is none (all of them are named); or it is no collection of rows.
    """
    _require_rows(rows, "data", "a file is read by holdfast.tasks.load_task(path).train")
    problems, placed = Problems(), _placed(rows, "row")
    form = _form_of_all([at for at in placed if not isinstance(at[1], Example)], columns)
    each = _by_answer(placed, form, problems, columns)
    found = [
        row if isinstance(row, Example) else _to_example(row, where, problems, columns, form)
        for where, row in each
    ]
    if needed and not placed:
        problems.add("data", "there are no rows")
    problems.raise_if_any()
    return [example for example in found if example is not None]


def to_questions(
    rows: Iterable[tuple[str, object]], problems: Problems, columns: Columns = STANDARD
) -> list[Example]:
    """What rows ask, given with their places; an answer may be there or not, and is not looked at.

    A row is a text, a list of chat messages, a mapping in one of the forms of `form_of`, or an example.
    """
    found = []
    for where, row in rows:
        try:
            found.append(row if isinstance(row, Example) else _question(row, columns))
        except RowFault as fault:
            problems.add_row(where, fault)
    return found


def as_questions(rows: Iterable[object]) -> list[Example]:
    """`to_questions` of anything that yields such rows.

    Raises
    ------
    DataError
        A row is malformed or empty, or there is none (all of them are named); or it is no collection of rows.
    """
    _require_rows(rows, "questions", "a single question goes into a list, too")
    problems = Problems()
    found = to_questions(_placed(rows, "question"), problems)
    if not found and not problems.found:
        problems.add("questions", "there are none")
    problems.raise_if_any()
    return found


def _require_rows(rows: object, whose: str, of_text: str) -> None:
    """Refuse what is iterated by something else than rows: by characters, splits or columns."""
    got = type(rows).__name__
    if isinstance(rows, str | bytes | os.PathLike):
        got, fix = kind_of(rows), of_text
    elif isinstance(rows, Mapping):
        fix = "of several splits give one, such as data['train']; of columns make rows"
    elif hasattr(rows, "columns") and hasattr(rows, "to_dict"):
        fix = "a table gives its rows by to_dict('records')"
    else:
        return
    raise DataError(f"{whose}: rows are needed, such as a list of them, got {got}; {fix}.")


def _placed(rows: Iterable[object], what: str) -> list[tuple[str, object]]:
    """Rows with their numbers; those of a ``datasets.Dataset`` as it gives them from a file, too."""
    plain = as_written(rows) if isinstance(getattr(rows, "features", None), Mapping) else rows
    return [(f"{what} {number}", row) for number, row in enumerate(plain, start=1)]


def _question(row: object, columns: Columns) -> Example:
    if isinstance(row, str | list | tuple):
        row, columns = {"prompt": row}, STANDARD
    if not isinstance(row, Mapping):
        raise RowFault(f"a question is a text, chat messages, or an object with them, got {kind_of(row)}")
    own = columns.unnamed and "prompt" not in row  # what is there says what it is
    chat = next((name for name in ("messages", "conversations") if own and name in row), columns.messages)
    text = "text" if own and "text" in row else columns.text
    prompt: str | tuple[Message, ...]
    if chat is not None:
        turns = read_messages(_get(row, chat), chat)
        prompt = _with_system(row, turns[:-1] if turns[-1]["role"] == "assistant" else turns)
    elif own and "instruction" in row:
        prompt = _instruction(row)
    elif text is not None:
        prompt = _text(_get(row, text), text)
    else:
        prompt = _prompt(_get(row, columns.prompt or "prompt"), columns.prompt or "prompt")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise RowFault("an empty question: there is nothing to answer")
    _refuse_half_characters({"prompt": prompt})
    return Example(prompt, "", (), _tools(row, columns))


def _example(row: object, columns: Columns, form: Form) -> Example:
    if not isinstance(row, Mapping):
        raise RowFault(
            f"a row must be an object such as {{'prompt': ..., 'completion': ...}}, got {kind_of(row)}"
        )
    prompt, completion = form.read(row)
    if not completion.strip():
        raise RowFault("empty completion: give the row an answer or leave it out")
    references, tools = _references(row, columns), _tools(row, columns)
    _refuse_half_characters({"prompt": prompt, "completion": completion, "references": references})
    return Example(prompt, completion, references, tools, form.raw)


def _pair(asked: str, answered: str, name: str) -> Form:
    def read(row: Row) -> tuple[str | tuple[Message, ...], str]:
        return _prompt(_get(row, asked), asked), _completion(_get(row, answered), answered)

    return Form(name, read, frozenset((asked, answered)))


PLAIN = _pair("prompt", "completion", "")


def _running(column: str, name: str) -> Form:
    def read(row: Row) -> tuple[str, str]:
        return "", _text(_get(row, column), column)

    return Form(name, read, frozenset((column,)), raw=True)


def _chat(column: str, name: str) -> Form:
    def read(row: Row) -> tuple[tuple[Message, ...], str]:
        given = _get(row, column)
        turns = read_messages(given, column)
        answer = read_answer(turns[-1], column)
        if not is_learned(given[-1]):
            raise RowFault(
                f"the last answer in '{column}' has the weight 0, and no other is learned: leave the row "
                "out, or learn its other answers with `turns: all` of the columns"
            )
        if len(turns) == 1:
            raise RowFault(f"'{column}' has an answer, but no message before it")
        return _with_system(row, turns[:-1]), answer

    return Form(name, read, frozenset((column, "system")), chat=column)


def _with_system(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """ShareGPT files may have the system's message in a column of its own."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or turns[0]["role"] == "system":
        return turns
    return ({"role": "system", "content": system}, *turns)


def _alpaca(row: Row) -> tuple[str, str]:
    return _instruction(row), _completion(_get(row, "output"), "output")


def _instruction(row: Row) -> str:
    instruction = _text(_get(row, "instruction"), "instruction")
    given = row.get("input")
    given = "" if given is None else _text(given, "input")
    return f"{instruction}\n{given}" if given.strip() else instruction


def _holds(value: object) -> bool:
    return value is not None and not (isinstance(value, str | list | tuple | dict) and not value)


def _get(row: Row, column: str) -> Any:
    """The value of a column, or of a text with {column} in it."""
    present = ", ".join(map(str, row)) or "(none)"
    if column in row:
        return row[column]
    if "{" not in column:
        raise NoColumn(f"no column '{column}'; columns of this row: {present}")
    try:
        return column.format_map(
            {key: _text(value, str(key)) for key, value in row.items() if f"{{{key}}}" in column}
        )
    except (KeyError, IndexError, ValueError) as error:
        raise RowFault(
            f"the text {column!r} can't be filled ({error}); columns of this row: {present}"
        ) from error


def _text(value: object, column: str) -> str:
    """A text; whole numbers and truth values count as texts, since labels are often such."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise RowFault(f"'{column}' must be a text, got {kind_of(value)}")


def _prompt(value: object, column: str) -> str | tuple[Message, ...]:
    if isinstance(value, bool):
        raise RowFault(f"'{column}' must be a text, got {kind_of(value)}")
    return read_messages(value, column) if isinstance(value, list | tuple) else _text(value, column)


def _completion(value: object, column: str) -> str:
    if not isinstance(value, list | tuple):
        return _text(value, column)
    turns = read_messages(value, column)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise RowFault(f"'{column}' must be a text or one assistant message, got {len(turns)} messages")
    return read_answer(turns[0], column)


def _tools(row: Row, columns: Columns) -> tuple[Mapping[str, Any], ...]:
    """The functions that the answer may call, for a chat template; none where `columns` reads them."""
    value = row.get("tools")
    told = any(name == "tools" or "{tools}" in name for name in columns.model_dump().values() if name)
    if told or not value:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowFault(
            f"'tools' must be a list of objects, got {kind_of(value)}; a column that means something else "
            "needs another name"
        )
    for tool in value:
        if function_in(tool) is None:
            raise RowFault(
                "a tool in 'tools' must be {'type': 'function', 'function': {'name': text, ...}}, got "
                f"{tool!r:.60}"
            )
    return tuple(value)


def _references(row: Row, columns: Columns) -> tuple[str, ...]:
    if columns.references is None and "references" not in row:
        return ()
    column = columns.references or "references"
    value = _get(row, column)
    if value is None:
        return ()
    if not isinstance(value, list | tuple | str | int):
        raise RowFault(f"'{column}' must be a list of texts, got {kind_of(value)}")
    items = value if isinstance(value, list | tuple) else (value,)
    answers = (_text(item, column) for item in items)
    return tuple(answer for answer in answers if answer.strip())  # an empty cell of a table is none


def _refuse_half_characters(parts: object, where: str = "") -> None:
    """A lone surrogate can be neither tokenised nor written to a file."""
    if isinstance(parts, str):
        if half := half_character(parts):
            raise RowFault(f"{half} is in '{where}' ({parts!r:.60}): write the whole character")
    elif isinstance(parts, Mapping):
        for key, value in parts.items():
            _refuse_half_characters(value, where or str(key))
    elif isinstance(parts, list | tuple):
        for value in parts:
            _refuse_half_characters(value, where)
