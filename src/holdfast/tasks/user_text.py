"""Tokens of a text that a user wrote: control tokens that stand in it are text like any other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "\U000f5e1d"  # private use: stands for a control token in a text that a chat template frames


class UserText:
    """Tokenises a user's texts.

    Control tokens are those that the tokenizer names (bos, eos, pad, unk, sep, cls, mask) and the special
    ones of its chat template. In a user's text they would end the answer or forge a turn, so they are
    tokenised as the characters that they are. Other special tokens were added to be used in texts, and are.

    Attributes
    ----------
    stand_in : str
        What `hide` writes for a control token.
    control, own : frozenset of str
        Control tokens, and the special tokens that are none.
    """

    stand_in = _STAND_IN

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        template = template if isinstance(template, str) else repr(template or "")
        special = {str(t) for t in tokenizer.all_special_tokens}
        special |= {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special}
        names = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
        named = {str(token) for n in names if (token := getattr(tokenizer, f"{n}_token", None))}
        self.control = frozenset(named | {token for token in special if token in template})
        self.own = frozenset(special - self.control)
        self._control, self._own = _any_of(self.control), _any_of(self.own)

    @property
    def own_ids(self) -> frozenset[int]:
        """Ids of the special tokens that may be part of an answer."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(token) for token in self.own)

    def controls_in(self, text: str) -> list[str]:
        """The control tokens that stand in a text."""
        return [] if self._control is None else self._control.findall(text)

    def ids(self, text: str) -> list[int]:
        """Tokens of a user's text."""
        if not self.controls_in(text):
            return self.framed_ids(text)
        ids: list[int] = []
        for piece in [text] if self._own is None else self._own.split(text):
            if piece in self.own:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def framed_ids(self, text: str) -> list[int]:
        """Tokens of a text of ours, in which control tokens are meant."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def hide(self, text: str, hidden: list[str]) -> str:
        """The text with a stand-in for each control token, which is appended to `hidden`."""
        if self._control is None:
            return text
        hidden += self._control.findall(text)
        return self._control.sub(_STAND_IN, text)

    def ids_with_hidden(self, text: str, hidden: list[str]) -> list[int]:
        """Tokens of a framed text, in which stand-ins are the texts of the control tokens."""
        first, *pieces = text.split(_STAND_IN) if hidden else [text]
        ids = self.framed_ids(first)
        for token, piece in zip(hidden, pieces, strict=True):
            ids += self.ids(token) + self.framed_ids(piece)
        return ids


def _any_of(tokens: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if tokens else None
