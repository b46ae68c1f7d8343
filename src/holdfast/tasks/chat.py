"""Chat messages as data sets write them: OpenAI's form with content parts and tool calls, and ShareGPT's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.tasks.problems import RowFault, kind_of
from holdfast.tasks.task import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {  # ShareGPT's names, and those that its descendants use
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
KEPT = ("tool_call_id", "name")  # what chat templates may show beside role, content and tool calls
_READ = ("role", "content", "from", "value", "tool_calls", "weight", *KEPT)


def read_messages(value: object, column: str) -> tuple[Message, ...]:
    """Messages ``{"role", "content"}`` or ``{"from", "value"}``; every content becomes a text.

    The arguments of tool calls become values, where they are JSON in a text as OpenAI's API gives them.

    Raises
    ------
    RowFault
        It is no list of messages, a role is unknown, a part of a content is no text, a tool call has no
        name, or a weight is neither 0 nor 1.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RowFault(f"'{column}' must be a list of messages, got {kind_of(value)}")
    return tuple(_message(turn, column) for turn in value)


def answers_in(turns: Sequence[object]) -> list[int]:
    """Where the assistant's answers before the last message end, of those that are to be learned.

    One that nothing was said before is none.
    """
    said = [turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None for turn in turns[:-1]]
    roles = [SPEAKERS.get(role.lower()) if isinstance(role, str) else None for role in said]
    spoken = [place for place, role in enumerate(roles) if role not in ("system", None)]
    answers = [place for place, role in enumerate(roles) if role == "assistant" and place > spoken[0]]
    return [place + 1 for place in answers if is_learned(turns[place])]


def is_learned(turn: object) -> bool:
    """Whether an answer is to be learned: OpenAI's format marks others with the weight 0."""
    return not (isinstance(turn, Mapping) and turn.get("weight") == 0)


def unread_in(turns: object) -> list[str]:
    """Keys of messages that hold something and that nothing is made of, such as reasoning."""
    messages = (
        [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list | tuple) else []
    )
    held = (str(key) for turn in messages for key, value in turn.items() if value and key not in _READ)
    return list(dict.fromkeys(held))


def _message(turn: object, column: str) -> Message:
    if isinstance(turn, Mapping) and isinstance(turn.get("from"), str) and "value" in turn:
        role, content, allowed = SPEAKERS.get(turn["from"].lower()), turn["value"], tuple(SPEAKERS)
        given = turn["from"]
    elif isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
        given, content, allowed = turn["role"], turn.get("content"), ROLES
        role = given if given in ROLES else None
    else:
        raise RowFault(_must_be(turn, column))
    if role is None:
        raise RowFault(f"unknown role '{given}' in '{column}'; allowed: {', '.join(allowed)}")
    if turn.get("weight") not in (None, 0, 1):
        raise RowFault(f"the weight of a message in '{column}' must be 0 or 1, got {turn['weight']!r:.40}")
    message: dict[str, Any] = {"role": role, "content": _content(turn, content, column)}
    if calls := _calls(turn.get("tool_calls"), column):
        message["tool_calls"] = calls
    return message | {key: turn[key] for key in KEPT if turn.get(key)}


def _calls(value: object, column: str) -> list[dict[str, Any]]:
    if not value:
        return []
    if not isinstance(value, list | tuple):
        raise RowFault(f"the tool calls of a message in '{column}' must be a list, got {kind_of(value)}")
    return [_call(call, column) for call in value]


def _call(call: object, column: str) -> dict[str, Any]:
    """A call with its arguments as a value, in the same frame."""
    function = function_in(call)
    if not isinstance(call, Mapping) or function is None or not isinstance(function.get("name"), str):
        raise RowFault(f"a tool call in '{column}' must have a function's name, got {call!r:.60}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise RowFault(f"the arguments of a tool call in '{column}' are no JSON ({error})") from error
    whole = {**function, "arguments": arguments}
    return {**call, "function": whole} if "function" in call else whole


def function_in(item: object) -> Mapping[str, Any] | None:
    """The function of a tool, or of a call, with or without its frame; None where there is none."""
    function = item.get("function", item) if isinstance(item, Mapping) else None
    return function if isinstance(function, Mapping) else None


def _content(turn: Mapping[str, Any], content: object, column: str) -> str:
    """A text; parts of text are joined, and a message that only calls tools has none."""
    if isinstance(content, str):
        return content
    if content is None and turn.get("tool_calls"):
        return ""
    if not isinstance(content, list | tuple):
        raise RowFault(_must_be(turn, column))
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            what = part.get("type", part) if isinstance(part, Mapping) else part
            raise RowFault(f"a message in '{column}' has a part that is no text ({what!r:.40})")
    return "".join(texts)


def _must_be(turn: object, column: str) -> str:
    return f"a message in '{column}' must be {{'role': text, 'content': text}}, got {turn!r:.60}"


def read_answer(turn: Message, column: str) -> str:
    """The text of the assistant's message that is trained on.

    Where it calls tools, the calls as JSON, ``{"name", "arguments"}`` one a line, stand behind its text.

    Raises
    ------
    RowFault
        The message is not the assistant's.
    """
    if turn["role"] != "assistant":
        raise RowFault(f"'{column}' must end with the assistant's answer, got role '{turn['role']}'")
    lines = [turn["content"]] if turn["content"] else []
    for call in turn.get("tool_calls", ()):
        function = call.get("function", call)
        said = {"name": function["name"], "arguments": function["arguments"]}
        lines.append(json.dumps(said, ensure_ascii=False))
    return "\n".join(lines)
