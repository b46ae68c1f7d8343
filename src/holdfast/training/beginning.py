"""Whether a trainer's rows begin as those do that were rated and are asked."""

from __future__ import annotations

import warnings
from typing import Any


def warn_of_other_beginning(dataset: Any, tokenizer: Any, first_token: int | None, whose: str) -> None:
    """Say so where one kind of rows begins with the tokenizer's begin token and the other doesn't.

    `holdfast.tasks.Template` puts it before a text; TRL's trainers only where the tokenizer itself does.

    Parameters
    ----------
    dataset : Any
        A trainer's, with ``input_ids``; where these can't be looked at, nothing is said.
    first_token : int or None
        With which all of our rows begin.
    whose : str
        What our rows are, for the message.
    """
    begin = getattr(tokenizer, "bos_token_id", None)
    try:
        row = dataset[0]["input_ids"]
    except (TypeError, KeyError, IndexError, NotImplementedError, AttributeError):
        return
    if begin is None or not len(row):
        return
    ours, theirs = first_token == begin, int(row[0]) == begin
    if ours != theirs:
        named = repr(tokenizer.bos_token)
        which, other = (whose, "the trainer's don't") if ours else ("the trainer's rows", f"{whose} don't")
        frame = "{prompt}" if ours else "{bos}{prompt}"
        warnings.warn(
            f"{which} begin with {named} and {other}: what is held is not quite what is trained. Give both "
            f'the same beginning, here by the template {{"prompt": "{frame}"}}.',
            stacklevel=3,
        )
