"""From examples to token ids: the template around a prompt, what is cut, and how rows become a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from holdfast.config import Options
from holdfast.errors import DataError
from holdfast.tasks.task import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses leave out


class Template(Options):
    """The frame around every prompt and completion, and how much of each is kept.

    With `chat`, a prompt that is text becomes one user turn of the tokenizer's chat template.
    ``{bos}`` and ``{eos}`` stand for the tokenizer's tokens (nothing where it has none). Chat prompts are
    framed by the tokenizer's own chat template, so `prompt` and `strip` do not apply to them. T5 expects its
    input to end in ``{eos}``: use ``prompt: "{prompt}{eos}"`` for it.
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


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids.

    Attributes
    ----------
    prompt_ids, completion_ids : list of int
        The tokens of the framed prompt and of the framed answer (with its end token).
    cut : int
        Tokens cut from the prompt.
    completion_cut : int
        Tokens cut from the answer.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    cut: int = 0
    completion_cut: int = 0


class Encoder:
    """Turns examples into token ids under a template.

    Frame, prompt text and answer are tokenised separately, so the tokens of a prompt don't depend on its
    answer and cutting never touches the frame.

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
            The answer or (for a causal model) the prompt has no tokens, or the tokenizer has no chat
            template for a chat prompt.
        """
        limit = self.template.max_completion_tokens
        answer_ids = self._ids(example.completion) if example.completion.strip() else []
        if not answer_ids:
            raise DataError(
                f"empty completion (prompt {_start_of(example.prompt)}): there is nothing to learn from it. "
                "Give the row an answer or leave it out."
            )
        if isinstance(example.prompt, str) and self.template.chat:
            turn = {"role": "user", "content": self._stripped(example.prompt)}
            prompt_ids, cut = self._chat((turn,))
        elif isinstance(example.prompt, str):
            prompt_ids, cut = self._text(example.prompt)
        else:
            prompt_ids, cut = self._chat(example.prompt)
        if not prompt_ids and not self.encoder_decoder:
            raise DataError(
                f"empty prompt (completion {_start_of(example.completion)}): a causal model needs a token to "
                "answer from. Put {bos} or some text into template.prompt."
            )
        before, after = self._completion_frame
        return Encoded(
            prompt_ids=prompt_ids,
            completion_ids=[*before, *answer_ids[:limit], *after],
            cut=cut,
            completion_cut=max(0, len(answer_ids) - limit),
        )

    def many(self, examples: Sequence[Example]) -> list[Encoded]:
        """Encode examples in order; an error names the row, counted from 1."""
        rows = []
        for number, example in enumerate(examples, start=1):
            try:
                rows.append(self(example))
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
        return rows

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _frame(self, frame: str, placeholder: str) -> tuple[list[int], list[int]]:
        for name in ("bos", "eos"):
            frame = frame.replace(f"{{{name}}}", getattr(self.tokenizer, f"{name}_token") or "")
        before, after = frame.split(placeholder)
        return self._ids(before), self._ids(after)

    def _stripped(self, text: str) -> str:
        if self.template.strip:
            text = text.rstrip().removesuffix(self.template.strip).rstrip()
        return text

    def _text(self, text: str) -> tuple[list[int], int]:
        ids, limit = self._ids(self._stripped(text)), self.template.max_prompt_tokens
        kept = ids[:limit] if self.template.keep == "first" else ids[-limit:]
        before, after = self._prompt_frame
        return [*before, *kept, *after], len(ids) - len(kept)

    def _chat(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Render messages by the chat template, after cutting the longest until their texts fit."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the prompt is a list of chat messages, but the tokenizer has no chat template. Use a model "
                "whose tokenizer has one, or give the prompt as text."
            )
        turns = [dict(message) for message in messages]
        lengths = [len(self._ids(turn["content"])) for turn in turns]
        cut = excess = max(0, sum(lengths) - self.template.max_prompt_tokens)
        while excess:
            longest = max(range(len(turns)), key=lengths.__getitem__)
            kept = max(0, lengths[longest] - excess)
            turns[longest]["content"] = self._shorten(turns[longest]["content"], kept)
            excess -= lengths[longest] - kept
            lengths[longest] = kept
        rendered: Any = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(rendered["input_ids"]), cut

    def _shorten(self, text: str, tokens: int) -> str:
        ids = self._ids(text)
        kept = ids[:tokens] if self.template.keep == "first" else ids[len(ids) - tokens :]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))


def _start_of(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= 60 else text[:57] + "..."


def _pad(rows: Sequence[list[int]], value: int, side: str) -> Tensor:
    """Rows of ids, padded on one side -> (S, T) int64."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(rows, fill, strict=True)]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


def _inputs(rows: Sequence[list[int]], pad_id: int, side: str, *, positions: bool) -> dict[str, Tensor]:
    mask_ST = _pad([[1] * len(row) for row in rows], 0, side)
    batch = {"input_ids": _pad(rows, pad_id, side), "attention_mask": mask_ST}
    if positions:  # a token's position must not depend on the padding before it
        batch["position_ids"] = (mask_ST.cumsum(dim=1) - 1).clamp(min=0)
    return batch


def collate(
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    encoder_decoder: bool,
    side: Literal["right", "left"] = "right",
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
        batch = _inputs([row.prompt_ids for row in rows], pad_id, side, positions=False)
        batch["labels"] = _pad([row.completion_ids for row in rows], IGNORED, "right")
        return batch
    batch = _inputs([row.prompt_ids + row.completion_ids for row in rows], pad_id, side, positions=True)
    batch["labels"] = _pad(
        [[IGNORED] * len(row.prompt_ids) + row.completion_ids for row in rows], IGNORED, side
    )
    return batch


def collate_prompts(rows: Sequence[Encoded], pad_id: int, *, encoder_decoder: bool) -> dict[str, Tensor]:
    """Make a batch to generate from: prompts only, padded on the left for a causal model.

    Returns
    -------
    dict of int64 tensors
        ``input_ids`` and ``attention_mask`` (S, T), with ``position_ids`` (S, T) for a causal model.
    """
    if not rows:
        raise ValueError("collate_prompts needs at least one row")
    side = "right" if encoder_decoder else "left"
    return _inputs([row.prompt_ids for row in rows], pad_id, side, positions=not encoder_decoder)
