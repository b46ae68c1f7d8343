"""Whether a trainer's rows begin as those do that were rated and are asked."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def warn_of_other_beginning(dataset: Any, tokenizer: Any, first_token: int | None, whose: str) -> None:
    """Say so where one kind of rows begins with the tokenizer's begin token and the other doesn't.

    `holdfast.tasks.Template` puts it before a text; TRL's trainers only where the tokenizer itself does.

    Parameters
    ----------
    dataset : Any
        A trainer's, with ``input_ids``; where these can't be looked at (a stream), nothing is said.
    first_token : int or None
        With which all of our rows begin.
    whose : str
        What our rows are, for the message.
    """
    begin, first = getattr(tokenizer, "bos_token_id", None), _first_token(dataset)
    if begin is None or first is None:
        return
    ours, theirs = first_token == begin, first == begin
    if ours != theirs:
        named = repr(tokenizer.bos_token)
        which, other = (whose, "the trainer's don't") if ours else ("the trainer's rows", f"{whose} don't")
        frame = "{prompt}" if ours else "{bos}{prompt}"
        warnings.warn(
            f"{which} begin with {named} and {other}: what is held is not quite what is trained. Give both "
            f'the same beginning, here by the template {{"prompt": "{frame}"}}.',
            stacklevel=3,
        )


def _first_token(dataset: Any) -> int | None:
    """Of the first row, behind its padding; None where there is no first row to be had again."""
    if not hasattr(dataset, "__len__"):
        return None
    try:
        row = dataset[0]
        ids = torch.as_tensor(row["input_ids"]).flatten()
        if "attention_mask" in row:
            ids = ids[torch.as_tensor(row["attention_mask"]).flatten().bool()]
        return int(ids[0])
    except (TypeError, KeyError, IndexError, ValueError, RuntimeError, AttributeError):
        return None
