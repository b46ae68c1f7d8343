"""How a task's prompts begin and end, as far as all of them do: what a model needs to write more of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from holdfast.errors import DataError
from holdfast.tasks.encode import Encoder
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
    system : tuple of messages or None
        The turns before the user's, where all rows have the same; None where prompts are text.
    """

    before: tuple[int, ...]
    shared: tuple[int, ...]
    closing: tuple[int, ...]
    part_of_text: bool = False
    system: tuple[Message, ...] | None = None

    @property
    def given(self) -> list[int]:
        """What the model goes on from."""
        return [*self.before, *self.shared]

    def prompt(self, text: str) -> str | tuple[Message, ...]:
        """A prompt of an `Example` with this text."""
        return text if self.system is None else (*self.system, {"role": "user", "content": text})


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
    kind = type(rows[0].prompt)
    alike = [row.prompt for row in rows if isinstance(row.prompt, str) == (kind is str)]
    texts = list(dict.fromkeys(tuple(encoder.text_ids(prompt)) for prompt in alike))
    systems = {repr(_before_user(prompt)) for prompt in alike}
    system = None if kind is str else (_before_user(alike[0]) if len(systems) == 1 else ())
    model_prompt = "" if system is None else (*system, {"role": "user", "content": ""})
    before, after = encoder.frame(model_prompt)
    shared = common_beginning(texts)
    closing = _until_special(after, encoder.tokenizer.all_special_ids)
    if closing:
        return Opening(tuple(before), shared, closing, system=system)
    ending = common_beginning(text[len(shared) :][::-1] for text in texts)[::-1]
    if not ending:
        raise DataError(
            f"task '{name}': a generated memory needs to know where a prompt ends, and its prompts have no "
            "ending in common. Put one behind {prompt} into the template, such as "
            r'`prompt: "{bos}{prompt}\nAnswer: "`, or for an encoder-decoder model `"{prompt}{eos}"`.'
        )
    return Opening(tuple(before), shared, ending, part_of_text=True, system=system)


def common_beginning(texts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """What all sequences begin with, short of the whole of any; nothing where there is only one."""
    different = list(dict.fromkeys(tuple(text) for text in texts))
    if len(different) < 2:
        return ()
    return tuple(commonprefix(different)[: min(len(text) for text in different) - 1])


def _before_user(prompt: str | Sequence[Message]) -> tuple[Message, ...]:
    roles = ["user" if isinstance(prompt, str) else turn["role"] for turn in prompt]
    return () if isinstance(prompt, str) else tuple(prompt[: roles.index("user")])


def _until_special(ids: Sequence[int], special: Sequence[int]) -> tuple[int, ...]:
    """Up to the first special token, such as the end of a turn: what follows it is always the same."""
    for i, token in enumerate(ids):
        if token in special:
            return tuple(ids[: i + 1])
    return tuple(ids)
