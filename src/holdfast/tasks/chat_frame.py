"""A chat as its tokenizer's template frames it: the prompt, and the token that ends an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.errors import DataError
from holdfast.tasks.problems import first_line
from holdfast.tasks.task import Message
from holdfast.tasks.user_text import UserText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "a question 5e1d", "an answer 5e1d"  # found again within the template's frame


class ChatFrame:
    """Renders chats by a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: UserText) -> None:
        self.tokenizer: Any = tokenizer
        self.user_text = text
        self._end: list[int] | None = None
        self._looked = False

    def prompt_ids(self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a chat up to where the assistant answers.

        Raises
        ------
        DataError
            There is no template, it refuses the messages, or it leaves a part of them out.
        """
        hidden: list[str] = []
        shown = [{**turn, "content": self.user_text.hide(turn["content"], hidden)} for turn in turns]
        rendered = self._render(shown, tools, add_generation_prompt=True)
        seen = _on_one_line(rendered)
        missing = [
            f"the {turn['role']}'s message"
            for turn in shown
            if turn["role"] != "assistant" and not _stands_in(turn["content"], seen)
        ]  # of the assistant's turns templates leave parts out, such as its reasoning
        calls = [call for turn in turns for call in turn.get("tool_calls", ())]
        for what, items in (("tool call", calls), ("tool", tools)):
            names = [item.get("function", item).get("name", "") for item in items]
            missing += [f"the {what} '{name}'" for name in names if str(name) not in rendered]
        if missing or rendered.count(self.user_text.stand_in) != len(hidden):
            what = missing[0] if missing else "a part of a message"
            raise DataError(
                f"the tokenizer's chat template leaves out {what}. Use a model whose template shows it, or "
                "write it into a user's message."
            )
        return self.user_text.ids_with_hidden(rendered, hidden)

    def text(self, turns: Sequence[Message]) -> str:
        """A chat up to where the assistant answers, rendered."""
        return self._render(turns, (), add_generation_prompt=True)

    def begins_no_answer(self) -> bool:
        """Whether the template is asked to begin an answer and doesn't; told once, and False from then on.

        Some need not: the end of the user's turn is all that stands before an answer.
        """
        if self._looked:
            return False
        self._looked = True
        turns = [{"role": "user", "content": _QUESTION}]
        asked = self._render(turns, (), add_generation_prompt=True)
        if asked != self._render(turns, (), add_generation_prompt=False):
            return False
        turns += [{"role": "assistant", "content": _ANSWER}]
        whole = self._render(turns, (), add_generation_prompt=False)
        behind = asked.rpartition(_QUESTION)[2].strip()
        return not behind or whole.rpartition(_ANSWER)[0].rpartition(_QUESTION)[2].strip() != behind

    def end_ids(self) -> list[int]:
        """The tokens behind an answer, up to the special one that ends the turn; none if there is none."""
        if self._end is None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
            rendered = self._render(turns, (), add_generation_prompt=False)
            ids = self.user_text.framed_ids(rendered.rpartition(_ANSWER)[2])
            special = {self.tokenizer.convert_tokens_to_ids(token) for token in self.user_text.control}
            last = next((i for i, token in enumerate(ids) if token in special), -1)
            self._end = ids[: last + 1]
        return self._end

    def _render(self, turns: Any, tools: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the prompt is a list of chat messages, but the tokenizer has no chat template. Use a model "
                "whose tokenizer has one, or give the prompt as text."
            )
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                turns,
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"the tokenizer's chat template refuses these messages ({roles}): {first_line(error)}. Put "
                "the text of a role that it doesn't know into the user's message."
            ) from error
        return str(rendered)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _stands_in(text: str, rendered: str) -> bool:
    """Whether a template shows a text; some change its spaces and line breaks, or write it as JSON."""
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    return any(_on_one_line(form) in rendered for form in (text, as_json))
