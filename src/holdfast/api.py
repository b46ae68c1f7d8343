"""``holdfast.attribute`` and ``holdfast.explain``: a model looked into, in one line of a script."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from holdfast.attribution import AttributionOptions
from holdfast.config import section
from holdfast.errors import ConfigError
from holdfast.evaluation.audit import require_sound
from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.evaluation.explaining import explain as why
from holdfast.importance import ImportancePrior, chosen_importance, compute_prior
from holdfast.importance.beside import as_beside, left_to_rate
from holdfast.importance.explanation import Explanation
from holdfast.models import is_encoder_decoder
from holdfast.progress import Progress
from holdfast.tasks.encode import Encoder, Template
from holdfast.tasks.rows import as_examples
from holdfast.tasks.task import Example, Task


def explain(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    answer: str,
    *,
    instead_of: str | None = None,
    template: Template | Mapping[str, Any] | None = None,
    options: AttributionOptions | Mapping[str, Any] | None = None,
) -> Explanation:
    """Why a model gives an answer: the relevance of each token that it reads, and of each weight.

    Parameters
    ----------
    model : nn.Module
        A transformers model, with or without PEFT. It is left exactly as it was.
    tokenizer : PreTrainedTokenizerBase
    prompt : str or sequence of messages
    answer : str
        Need not be what the model would say.
    instead_of : str, optional
        Another answer to the same prompt: what speaks for the one and not for the other.
    template : Template or mapping, optional
        The frame around prompts and completions; it must be the one that the model is trained with.
    options : AttributionOptions or mapping, optional
        Rules and target.

    Returns
    -------
    Explanation
        A notebook shows it as a heat map; ``.save("why.html")`` writes one.

    Raises
    ------
    HoldfastError
        Prompt or answer is empty, or an operation of the model has no rule.
    """
    chosen = section(AttributionOptions, options, "explain: options")
    encoder = _encoder(model, tokenizer, template, "explain")
    return why(model, encoder, prompt, answer, chosen, instead_of=instead_of, tell=warnings.warn)


def attribute(
    model: nn.Module,
    tokenizer: Any,
    dataset: Iterable[Example | Mapping[str, Any]],
    *,
    importance: Any = "inputs",
    beside: ImportancePrior | None = None,
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
    beside : ImportancePrior, optional
        A prior of this model: rate, by weight, only what is trained and that one leaves out (experts,
        embeddings, norms, biases, where it is of the kind ``inputs``), for `ProtectCallback`'s ``beside``.
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
    chosen, parameters = chosen_importance(importance), None
    if beside is not None and not (parameters := left_to_rate(model, chosen, beside)):
        raise ConfigError(
            f"attribute: importance '{chosen.name}' rates nothing that `beside` leaves out; there is no need "
            "for a second prior."
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    data = Task(task or "data", as_examples(dataset), ())
    with Progress(quiet=not progress) as bars, bars.bar("importance", total=len(data.train)) as bar:
        encoder = _encoder(model, tokenizer, template, "attribute")
        require_sound(data, encoder, model, EvaluationOptions(), bars.remark)
        rows = encoder.many(data.train)
        prior = compute_prior(
            model,
            rows,
            chosen,
            pad_id=pad_id,
            seed=seed,
            task=task,
            parameters=parameters,
            progress=bar,
        )
    return prior if beside is None else as_beside(prior)


def _encoder(
    model: nn.Module, tokenizer: Any, template: Template | Mapping[str, Any] | None, caller: str
) -> Encoder:
    frame = section(Template, template, f"{caller}: template")
    return Encoder(tokenizer, frame, encoder_decoder=is_encoder_decoder(model))
