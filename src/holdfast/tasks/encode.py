"""From examples to token ids: the template around a prompt, what is cut, and how rows become a batch."""

from __future__ import annotations

import copy
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from holdfast.config import Options
from holdfast.errors import DataError
from holdfast.tasks.chat_frame import ChatFrame
from holdfast.tasks.task import Example, Message
from holdfast.tasks.user_text import UserText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses leave out
_SHOWN = 256  # rows from one look at the progress to the next


class Template(Options):
    """The frame around every prompt and completion, and how much of each is kept.

    ``{bos}`` and ``{eos}`` stand for the tokenizer's tokens (nothing where it has none). Chat prompts are
    framed by the tokenizer's own chat template, so `prompt` and `strip` do not apply to them, and their
    answers end as the template ends a turn, unless `completion` is set. With `chat`, a prompt that is text is
    one of these: `strip` applies to it, then it becomes one user turn. T5 expects its input to end in
    ``{eos}``: use ``prompt: "{prompt}{eos}"`` for it.
    """

    prompt: str = Field(
        default="{bos}{prompt}", description="frame of a prompt; {prompt} stands in it exactly once"
    )
    completion: str = Field(
        default="{completion}{eos}", description="frame of an answer, with {completion} once"
    )
    chat: bool = Field(
        default=False,
        description="put each text prompt into a user turn of the tokenizer's chat template",
    )
    strip: str = Field(
        default="", description="removed from the end of the prompt text, with the space around it"
    )
    max_prompt_tokens: int = Field(
        default=512, ge=1, description="tokens of {prompt} itself; the frame is never cut"
    )
    keep: Literal["first", "last"] = Field(
        default="first", description="which end of a too long prompt is kept"
    )
    max_completion_tokens: int = Field(default=128, ge=1, description="tokens of {completion} itself")

    @field_validator("prompt", "completion")
    @classmethod
    def _placeholders(cls, value: str, info: Any) -> str:
        own, found = info.field_name, re.findall(r"\{(\w+)\}", value)
        if found.count(own) != 1:
            raise ValueError(f"{{{own}}} must stand in the template exactly once, got {value!r}")
        if unknown := sorted(set(found) - {own, "bos", "eos"}):
            names = ", ".join(f"{{{name}}}" for name in unknown)
            raise ValueError(f"unknown placeholder {names}; allowed here: {{{own}}}, {{bos}}, {{eos}}")
        return value

    @model_validator(mode="after")
    def _one_frame(self) -> Template:
        if self.chat and self.prompt != Template.model_fields["prompt"].default:
            raise ValueError(
                "`prompt` doesn't combine with `chat: true`, where the chat template is the frame of every "
                "prompt; leave out one of the two"
            )
        return self


class Encoded:
    """One example as token ids, kept in four bytes each.

    Parameters
    ----------
    prompt_ids, completion_ids : iterable of int
        The tokens of the framed prompt and of the framed answer (with its end token); as attributes new
        lists at each look.
    cut : int
        Tokens cut from the prompt.
    completion_cut : int
        Tokens cut from the answer.
    """

    __slots__ = ("_completion", "_prompt", "completion_cut", "cut")

    def __init__(
        self, prompt_ids: Iterable[int], completion_ids: Iterable[int], cut: int = 0, completion_cut: int = 0
    ) -> None:
        self._prompt, self._completion = array("i", prompt_ids), array("i", completion_ids)
        self.cut, self.completion_cut = cut, completion_cut

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens of the framed prompt."""
        return self._prompt.tolist()

    @property
    def completion_ids(self) -> list[int]:
        """Tokens of the framed answer, with its end token."""
        return self._completion.tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoded) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self._prompt.tobytes(), self._completion.tobytes()))

    def __repr__(self) -> str:
        return f"Encoded({self.prompt_ids}, {self.completion_ids}, {self.cut}, {self.completion_cut})"

    def _values(self) -> tuple[Any, ...]:
        return self._prompt, self._completion, self.cut, self.completion_cut


def first_token(rows: Iterable[Encoded]) -> int | None:
    """The token with which all of some rows begin; None where they don't share one."""
    firsts = {row.prompt_ids[0] for row in rows if row.prompt_ids}
    return firsts.pop() if len(firsts) == 1 else None


class Encoder:
    """Turns examples into token ids under a template.

    Frame, prompt text and answer are tokenised separately, so the tokens of a prompt don't depend on its
    answer and cutting never touches the frame. A control token in a user's text is text (`UserText`).

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    template : Template
    encoder_decoder : bool
        Whether the rows are meant for an encoder-decoder model. There an empty prompt is no error, since the
        decoder brings its own start token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, *, encoder_decoder: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.encoder_decoder = encoder_decoder
        self.text = UserText(tokenizer)
        self._chats = ChatFrame(tokenizer, self.text)
        # by identity, which the example's life keeps: rows, and questions without their answers
        self._known: dict[int, tuple[Example, Encoded]] = {}
        self._asked: dict[int, tuple[Example, Encoded]] = {}
        if template.chat and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "template.chat: the tokenizer has no chat template. Leave `chat` out and frame prompts with "
                "template.prompt, or use a model whose tokenizer has one."
            )
        self._prompt_frame = self._frame(template.prompt, "{prompt}")
        self._completion_frame = self._frame(template.completion, "{completion}")

    def __call__(self, example: Example) -> Encoded:
        """Encode one example.

        Raises
        ------
        DataError
            The answer or (for a causal model) the prompt has no tokens, or the tokenizer's chat template
            can't frame a chat prompt.
        """
        if example.raw:
            return self._raw(example.completion, example.ended)
        chat = self.asks_in_turns(example.prompt)
        completion_ids, completion_cut = self._answer(example.completion, chat=chat, ended=example.ended)
        if not completion_ids:
            raise DataError(
                f"empty completion (prompt {_start_of(example.prompt)}): there is nothing to learn from it. "
                "Give the row an answer or leave it out."
            )
        asked = self.question(example)
        return Encoded(asked.prompt_ids, completion_ids, asked.cut, completion_cut)

    def question(self, example: Example) -> Encoded:
        """Encode what an example asks, without an answer, or give what `questions` has.

        Raises
        ------
        DataError
            The prompt has no tokens for a causal model, or the chat template can't frame it.
        """
        if (known := self._asked.get(id(example))) is not None:
            return known[1]
        if isinstance(example.prompt, str) and self.template.chat:
            prompt_ids, cut = self._chat(_user_turn(self._stripped(example.prompt)), example.tools)
        elif isinstance(example.prompt, str):
            prompt_ids, cut = self._text(example.prompt)
        else:
            prompt_ids, cut = self._chat(example.prompt, example.tools)
        if not prompt_ids and not self.encoder_decoder:
            raise DataError(
                f"empty prompt (completion {_start_of(example.completion)}): a causal model needs a token to "
                "answer from. Put {bos} or some text into template.prompt."
            )
        return Encoded(prompt_ids, [], cut)

    def asks_in_turns(self, prompt: str | Sequence[Message]) -> bool:
        """Whether the tokenizer's chat template frames a prompt."""
        return self.template.chat or not isinstance(prompt, str)

    def leaves_out_tools(self, example: Example) -> bool:
        """Whether an example has tools and no chat template frames it, which would show them."""
        return bool(example.tools) and (example.raw or not self.asks_in_turns(example.prompt))

    def begins_no_answer(self, examples: Iterable[Example]) -> bool:
        """Whether the chat template that frames some of these begins no answer; told once."""
        chats = any(not example.raw and self.asks_in_turns(example.prompt) for example in examples)
        return chats and self._chats.begins_no_answer()

    def answer_ids(self, text: str, *, chat: bool = False) -> list[int]:
        """Tokens of an answer in its frame, behind a chat or behind a text; none of an empty one."""
        return self._answer(text, chat=chat)[0]

    def stop_ids(self, *, chat: bool = False) -> list[int]:
        """The tokens that end an answer: the tokenizer's own, and that of its chat template."""
        end = self._chats.end_ids() if chat and self._ends_as_chat else []
        return list(dict.fromkeys([*end[-1:], self.tokenizer.eos_token_id]))

    @property
    def begin_ids(self) -> list[int]:
        """What running text stands behind: the begin token, or the end token where there is no other."""
        begin = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if begin is None or self.encoder_decoder else begin]

    def _raw(self, text: str, ended: bool) -> Encoded:
        """Running text: as long as prompt and answer together may be, and ended where none of it is cut."""
        ids = self.text.ids(text) if text.strip() else []
        if not ids:
            raise DataError("an empty text: there is nothing to learn from it. Leave the row out.")
        limit = self.template.max_prompt_tokens + self.template.max_completion_tokens
        end = [self.tokenizer.eos_token_id] if ended and len(ids) <= limit else []
        return Encoded(self.begin_ids, [*ids[:limit], *end], completion_cut=max(0, len(ids) - limit))

    @property
    def _ends_as_chat(self) -> bool:
        return self.template.completion == Template.model_fields["completion"].default

    def _answer(self, text: str, *, chat: bool, ended: bool = True) -> tuple[list[int], int]:
        """Framed tokens, and how many are cut."""
        ids = self.text.ids(text) if text.strip() else []
        if not ids:
            return [], 0
        limit = self.template.max_completion_tokens
        before, after = self._completion_frame
        if chat and self._ends_as_chat:
            after = self._chats.end_ids() or after
        return [*before, *ids[:limit], *(after if ended else ())], max(0, len(ids) - limit)

    def many(
        self, examples: Sequence[Example], progress: Callable[[int], None] | None = None
    ) -> list[Encoded]:
        """Encode examples in order, each once until `forget`; an error names the row, counted from 1.

        Parameters
        ----------
        progress : callable, optional
            Told now and then how many are done.
        """
        return _each(examples, self._known, self, "row", progress)

    def questions(
        self, examples: Sequence[Example], progress: Callable[[int], None] | None = None
    ) -> list[Encoded]:
        """As `many`, without answers."""
        return _each(examples, self._asked, self.question, "question", progress)

    def forget(self, but: Iterable[Example] = ()) -> None:
        """Let go of what is kept against being encoded again: questions, and rows `but` for some."""
        kept = {id(example) for example in but}
        self._known = {key: row for key, row in self._known.items() if key in kept}
        self._asked.clear()

    def apart(self) -> Encoder:
        """The same encoder with nothing kept, for rows that are looked at once: all goes with it."""
        other = copy.copy(self)
        other._known, other._asked = {}, {}
        return other

    def frame(self, prompt: str | Sequence[Message]) -> tuple[list[int], list[int]]:
        """The tokens around the text of a prompt, before it and behind it.

        Of chat messages: around the text of their first user turn, where no other turn follows it.
        """
        if not self.asks_in_turns(prompt):
            return self._prompt_frame
        before = [] if isinstance(prompt, str) else before_user(prompt)
        mark = "\N{SYMBOL FOR SUBSTITUTE FORM TWO}"
        ends = self._chats.text([*before, *_user_turn(mark)]).split(mark)
        return self.text.framed_ids(ends[0]), self.text.framed_ids(ends[-1])

    def text_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """The tokens of a prompt's text (of chat messages: of the first user turn's), cut as in a row."""
        if isinstance(prompt, str):
            return self._kept(prompt)[0]
        turn = prompt[len(before_user(prompt))]
        return self.text.ids(turn["content"])[: self.template.max_prompt_tokens]

    @property
    def completion_frame_size(self) -> int:
        """How many tokens the frame of an answer has, such as its end token."""
        return sum(len(part) for part in self._completion_frame)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones and otherwise to the letter."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def answer_of(self, ids: Sequence[int]) -> str:
        """The answer in tokens that a model wrote, without its frame."""
        before, after = (self.text_of(part) for part in self._completion_frame)
        return self.text_of(ids).removeprefix(before).removesuffix(after)

    def _frame(self, frame: str, placeholder: str) -> tuple[list[int], list[int]]:
        for name in ("bos", "eos"):
            frame = frame.replace(f"{{{name}}}", getattr(self.tokenizer, f"{name}_token") or "")
        before, after = frame.split(placeholder)
        return self.text.framed_ids(before), self.text.framed_ids(after)

    def _stripped(self, text: str) -> str:
        if self.template.strip:
            text = text.rstrip().removesuffix(self.template.strip).rstrip()
        return text

    def _kept(self, text: str) -> tuple[list[int], int]:
        ids, limit = self.text.ids(self._stripped(text)), self.template.max_prompt_tokens
        kept = ids[:limit] if self.template.keep == "first" else ids[-limit:]
        return kept, len(ids) - len(kept)

    def _text(self, text: str) -> tuple[list[int], int]:
        kept, cut = self._kept(text)
        before, after = self._prompt_frame
        return [*before, *kept, *after], cut

    def _chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[list[int], int]:
        """Render messages by the chat template, after cutting the longest until their texts fit."""
        turns = [dict(message) for message in messages]
        lengths = [len(self.text.ids(turn["content"])) for turn in turns]
        cut = excess = max(0, sum(lengths) - self.template.max_prompt_tokens)
        while excess:
            longest = max(range(len(turns)), key=lengths.__getitem__)
            kept = max(0, lengths[longest] - excess)
            turns[longest]["content"] = self._shorten(turns[longest]["content"], kept)
            excess -= lengths[longest] - kept
            lengths[longest] = kept
        return self._chats.prompt_ids(turns, tools), cut

    def _shorten(self, text: str, tokens: int) -> str:
        ids = self.text.ids(text)
        kept = ids[:tokens] if self.template.keep == "first" else ids[len(ids) - tokens :]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))


def _each(
    examples: Sequence[Example],
    known: dict[int, tuple[Example, Encoded]],
    encode: Callable[[Example], Encoded],
    what: str,
    progress: Callable[[int], None] | None,
) -> list[Encoded]:
    rows = []
    for number, example in enumerate(examples, start=1):
        found = known.get(id(example))
        if found is None:
            try:
                found = known[id(example)] = example, encode(example)
            except DataError as error:
                raise DataError(f"{what} {number}: {error}") from error
        rows.append(found[1])
        if progress is not None and number % _SHOWN == 0:
            progress(number)
    return rows


def _user_turn(text: str) -> tuple[Message]:
    return ({"role": "user", "content": text},)


def before_user(messages: Sequence[Message]) -> list[Message]:
    """The turns before the first of a user's, such as a system message.

    Raises
    ------
    DataError
        There is no turn of a user.
    """
    for i, message in enumerate(messages):
        if message["role"] == "user":
            return list(messages[:i])
    raise DataError(f"the chat messages {_start_of(messages)} have no turn of a user.")


def _start_of(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= 60 else text[:57] + "..."


def _pad(rows: Sequence[list[int]], value: int, side: str) -> Tensor:
    """Rows of ids, padded on one side -> (S, T) int64."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(rows, fill, strict=True)]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


def _inputs(
    rows: Sequence[list[int]], pad_id: int, side: str, first_position: int | None
) -> dict[str, Tensor]:
    mask_ST = _pad([[1] * len(row) for row in rows], 0, side)
    batch = {"input_ids": _pad(rows, pad_id, side), "attention_mask": mask_ST}
    if first_position is not None:
        batch["position_ids"] = positions(mask_ST, first_position)
    return batch


def positions(mask_ST: Tensor, first: int) -> Tensor:
    """Position of each token among the unmasked ones, so that it doesn't depend on the padding before it."""
    return (mask_ST.long().cumsum(dim=1) - 1).clamp(min=0) + first


def collate(
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    encoder_decoder: bool,
    side: Literal["right", "left"] = "right",
    first_position: int | None = 0,
) -> dict[str, Tensor]:
    """Make a training batch; the loss sees the completion only.

    Parameters
    ----------
    rows : sequence of Encoded
        At least one.
    pad_id : int
        Fills the inputs; it may equal the end token, since masks and labels never depend on it.
    side : {"right", "left"}
        Where inputs are padded. The labels of an encoder-decoder model are always padded on the right,
        because its decoder starts at the first column.
    first_position : int, optional
        A causal model's, see `holdfast.models.first_position`; None: it gets no positions.

    Returns
    -------
    dict of int64 tensors
        Causal: ``input_ids``, ``attention_mask``, ``labels`` (-100 except on the completion) and
        ``position_ids``, each (S, T). Encoder-decoder: ``input_ids`` and ``attention_mask`` (S, T_prompt),
        ``labels`` (S, T_completion).
    """
    if not rows:
        raise ValueError("collate needs at least one row")
    if encoder_decoder:
        batch = _inputs([row.prompt_ids for row in rows], pad_id, side, None)
        batch["labels"] = _pad([row.completion_ids for row in rows], IGNORED, "right")
        return batch
    batch = _inputs([row.prompt_ids + row.completion_ids for row in rows], pad_id, side, first_position)
    batch["labels"] = _pad(
        [[IGNORED] * len(row.prompt_ids) + row.completion_ids for row in rows], IGNORED, side
    )
    return batch


def collate_prompts(
    rows: Sequence[Encoded], pad_id: int, *, encoder_decoder: bool, first_position: int | None = None
) -> dict[str, Tensor]:
    """Make a batch to generate from: prompts only, padded on the left for a causal model.

    Returns
    -------
    dict of int64 tensors
        ``input_ids`` and ``attention_mask`` (S, T), with ``position_ids`` (S, T) if there is a first one.
    """
    if not rows:
        raise ValueError("collate_prompts needs at least one row")
    side = "right" if encoder_decoder else "left"
    return _inputs([row.prompt_ids for row in rows], pad_id, side, first_position)
