"""``holdfast.attribute``: the prior of a model for a data set, in one line of a user's own script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from holdfast.importance import ImportancePrior, compute_prior
from holdfast.models import is_encoder_decoder
from holdfast.progress import Progress
from holdfast.tasks.encode import Encoder, Template
from holdfast.tasks.rows import as_examples
from holdfast.tasks.task import Example


def attribute(
    model: nn.Module,
    tokenizer: Any,
    dataset: Iterable[Example | Mapping[str, Any]],
    *,
    importance: Any = "inputs",
    template: Template | Mapping[str, Any] | None = None,
    seed: int = 0,
    task: str = "",
    progress: bool = True,
) -> ImportancePrior:
    """What of a model matters for its answers on a data set, for a hold to keep.

    Parameters
    ----------
    model : nn.Module
        A transformers model, with or without PEFT. It is left exactly as it was.
    tokenizer : PreTrainedTokenizerBase
    dataset : iterable
        Rows with ``prompt`` and ``completion``, or chat ``messages`` (a `datasets.Dataset`, a list of
        dicts, or `Example` objects).
    importance : str, mapping or options
        ``"inputs"`` (default): of each linear map the directions of its inputs where relevance went, which is
        what kept most. ``"lrp"``, ``"fisher"``, ...: a number for each weight. Or with options:
        ``{"name": "lrp", "rules": "paper"}``.
    template : Template or mapping, optional
        The frame around prompts and completions; it must be the one that the model is trained with.

    Returns
    -------
    ImportancePrior
        For `ProtectCallback`, `Gate`, `Anchor` or `Penalty`.

    Raises
    ------
    HoldfastError
        Bad rows, no sample that the model answers correctly, an operation without a rule, ...
    """
    frame = template if isinstance(template, Template) else Template(**(template or {}))
    encoder = Encoder(tokenizer, frame, encoder_decoder=is_encoder_decoder(model))
    rows = encoder.many(as_examples(dataset))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with Progress(quiet=not progress) as bars, bars.bar("importance", total=len(rows)) as bar:
        return compute_prior(model, rows, importance, pad_id=pad_id, seed=seed, task=task, progress=bar)
