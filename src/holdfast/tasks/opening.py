"""How a task's prompts begin and end, as far as all of them do: what a model needs to write more of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.errors import DataError
from holdfast.tasks.encode import Encoder, before_user
from holdfast.tasks.task import Example, Message


@dataclass(frozen=True)
class Opening:
    """The ends of a task's prompts; no row, and nothing that fewer than two different rows share.

    Attributes
    ----------
    before : tuple of int
        Tokens of the frame in front of a prompt's text: the begin token, the chat template's opening.
    shared : tuple of int
        The longest common beginning of all the texts, shorter than each of them: the task's instruction.
    closing : tuple of int
        The tokens at which a prompt is complete.
    part_of_text : bool
        Whether the closing belongs to the prompt's text, because all texts end so, or to the frame.
    cut : bool
        Whether some prompts are cut at the template's limit and closed there by the frame: then one that the
        model writes up to this limit is whole as well.
    system : tuple of messages or None
        The turns before the user's, where all rows have the same; None where prompts are text.
    raw : bool
        Rows are running text: what is written up to the end token is the whole row, and nothing is asked.
    """

    before: tuple[int, ...]
    shared: tuple[int, ...]
    closing: tuple[int, ...]
    part_of_text: bool = False
    cut: bool = False
    system: tuple[Message, ...] | None = None
    raw: bool = False

    @property
    def given(self) -> list[int]:
        """What the model goes on from."""
        return [*self.before, *self.shared]

    def prompt(self, text: str) -> str | tuple[Message, ...]:
        """A prompt of an `Example` with this text."""
        return text if self.system is None else (*self.system, {"role": "user", "content": text})

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Opening:
        """The opening that `record` gave."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)


def opening_of(rows: Sequence[Example], encoder: Encoder, name: str) -> Opening:
    """The opening of a task's training prompts.

    Parameters
    ----------
    name : str
        Of the task, for the message.

    Raises
    ------
    DataError
        Nothing marks the end of a prompt: neither the template nor an ending that all of them have.
    """
    if all(row.raw for row in rows):
        return running(encoder)
    rows = [row for row in rows if not row.raw]
    chat = not isinstance(rows[0].prompt, str)
    alike = [row.prompt for row in rows if isinstance(row.prompt, str) != chat]
    texts = list(dict.fromkeys(tuple(encoder.text_ids(prompt)) for prompt in alike))
    system: tuple[Message, ...] | None = None
    model_prompt: str | tuple[Message, ...] = ""
    if chat:
        befores = [tuple(before_user(prompt)) for prompt in alike if not isinstance(prompt, str)]
        same = len(texts) > 1 and all(turns == befores[0] for turns in befores)
        system = befores[0] if same else ()
        model_prompt = (*system, {"role": "user", "content": ""})
    before, after = encoder.frame(model_prompt)
    shared = common_beginning(texts)
    closing = _until_special(after, encoder.tokenizer.all_special_ids)
    if closing:
        cut = encoder.template.keep == "first" and any(encoder(row).cut for row in rows)
        return Opening(tuple(before), shared, closing, cut=cut, system=system)
    ending = common_beginning(text[len(shared) :][::-1] for text in texts)[::-1]
    if not ending:
        raise DataError(
            f"task '{name}': a generated memory needs to know where a prompt ends, and its prompts have no "
            "ending in common. Put one behind {prompt} into the template, such as "
            r'`prompt: "{bos}{prompt}\nAnswer: "`, or for an encoder-decoder model `"{prompt}{eos}"`.'
        )
    return Opening(tuple(before), shared, ending, part_of_text=True, system=system)


def running(encoder: Encoder) -> Opening:
    """The opening of running text: the begin token, or a decoder's own start."""
    before = () if encoder.encoder_decoder else tuple(encoder.begin_ids)
    return Opening(before, (), (encoder.tokenizer.eos_token_id,), raw=True)


def chat_opening(encoder: Encoder) -> Opening | None:
    """The opening of any user's first turn; None where there is no chat template, or it ends no turn."""
    if not getattr(encoder.tokenizer, "chat_template", None):
        return None
    before, after = encoder.frame(({"role": "user", "content": ""},))
    closing = _until_special(after, encoder.tokenizer.all_special_ids)
    return Opening(tuple(before), (), closing, system=()) if closing else None


def common_beginning(texts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """What all sequences begin with, short of the whole of any; nothing where there is only one."""
    different = sorted({tuple(text) for text in texts})
    if len(different) < 2:
        return ()
    low, high = different[0], different[-1]  # what these two share, all that sort between them share
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: min(shared, *(len(text) - 1 for text in different))]


def _until_special(ids: Sequence[int], special: Sequence[int]) -> tuple[int, ...]:
    """Up to the first special token, such as the end of a turn: what follows it is always the same."""
    for i, token in enumerate(ids):
        if token in special:
            return tuple(ids[: i + 1])
    return tuple(ids)
