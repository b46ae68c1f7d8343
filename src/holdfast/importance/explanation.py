"""One answer explained: the relevance of each token that the model read, and of each weight."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from holdfast.attribution import AttributionOptions, attribute_one
from holdfast.attribution.options import starts_below_head
from holdfast.errors import ConfigError
from holdfast.importance.prior import ImportancePrior
from holdfast.models import block_parameters, text_part
from holdfast.storage import write_text
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Example

_FOR, _AGAINST = "24, 130, 90", "200, 60, 40"  # red, green, blue of the two signs
_PARTS = {  # of `Explanation.parts`, in words
    "tokens": "tokens shown",
    "answers": "the answers' own tokens",
    "biases": "biases",
    "absorbed": "constants",
    "created": "handed out twice",
    "weights": "weights",
}
_TARGETS = {"logit": "logits", "log_probability": "logits above the mean of all tokens, by probability,"}
_SEEN = 0.1  # of the strongest: below it a token has no colour in a terminal


class _Relevance:
    """Keeps R(W) = W · ∂ of one sample's map, (A, section 4.1)."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take one sample's map, or none of a weight that it does not reach."""
        self.tensors[name] = (weight.detach() * grad_S.detach().sum(0)).float().cpu()


@dataclass(frozen=True, repr=False)
class Explanation:
    """What an answer's logits are made of.

    Attributes
    ----------
    tokens : list of str
        What the model read: the prompt with its frame, then the answer up to its last token but one; of an
        encoder-decoder model what the encoder read, then what the decoder did.
    relevance : Tensor
        Of each token, (T,) float64; above 0 it speaks for the answer.
    asked : int
        How many of the tokens are the prompt's.
    answer : str
    target : float
        The sum of the answer's logits, which is what is explained; with ``of: log_probability`` of each one
        less the mean of all tokens' logits, weighted by their probabilities.
    weights : ImportancePrior
        The relevance of each weight of the linear maps in the transformer blocks, signed: of those that are
        trained (a LoRA's factors), or of all where nothing is. ``weights.top(20)``, ``weights.by_layer()``.
    conservation_error : float
        |sum of what was found - target| / |target|; of a difference, by the larger target of the two.
    elsewhere : dict
        Relevance that ends in no token shown: ``biases``, ``absorbed`` by constants such as the biases of
        norms, and ``created``, which products of two activations handed out twice (subtracted); of a
        difference, ``answers``, what ends in tokens of the answers themselves. Tokens + answers + biases +
        absorbed - created (+ weights, with ``halves: path``) is the target, see `parts`.
    against : str
        The other answer, where two were contrasted; all numbers are differences then.
    logits : tuple of int
        How many logits the target sums; of a difference, of each answer.
    options : AttributionOptions
        How it was explained.
    """

    tokens: list[str]
    relevance: Tensor
    asked: int
    answer: str
    target: float
    weights: ImportancePrior
    conservation_error: float
    elsewhere: dict[str, float] = field(default_factory=dict)
    against: str = ""
    logits: tuple[int, ...] = ()
    options: AttributionOptions = field(default_factory=AttributionOptions)

    def instead_of(self, other: Explanation) -> Explanation:
        """What speaks for this answer and not for another one to the same prompt: the differences.

        The tokens are the prompt's alone, as the answers have others; what ends in those is in
        ``elsewhere["answers"]``.

        Raises
        ------
        ConfigError
            The prompts or the options differ.
        """
        if self.tokens[: self.asked] != other.tokens[: other.asked]:
            raise ConfigError("explain: two answers are contrasted on one prompt; these have different ones.")
        if self.options != other.options:
            raise ConfigError(
                "explain: two answers are contrasted under the same options, got "
                f"{self.options.model_dump()} and {other.options.model_dump()}. Explain both with the same."
            )
        weights = {name: tensor - other.weights[name] for name, tensor in self.weights.items()}
        elsewhere = {key: value - other.elsewhere[key] for key, value in self.elsewhere.items()}
        answers = [float(one.relevance[one.asked :].sum()) for one in (self, other)]
        found = replace(
            self,
            tokens=self.tokens[: self.asked],
            relevance=self.relevance[: self.asked] - other.relevance[: self.asked],
            target=self.target - other.target,
            weights=ImportancePrior(weights, self.weights.meta),
            elsewhere={"answers": answers[0] - answers[1], **elsewhere},
            against=other.answer,
            logits=self.logits + other.logits,
        )
        scale = max(abs(self.target), abs(other.target)) or 1.0
        error = abs(sum(found.parts.values()) - found.target) / scale
        return replace(found, conservation_error=error)

    @property
    def parts(self) -> dict[str, float]:
        """What adds up to the target: the ``tokens`` shown, and what is ``elsewhere``."""
        parts = {"tokens": float(self.relevance.sum()), **self.elsewhere}
        parts["created"] = -parts["created"]
        if self.options.halves != "path":  # weights take nothing from the path
            del parts["weights"]
        return parts

    @property
    def what(self) -> str:
        """What is explained, in words."""
        return f"{self.answer!r}" + (f" instead of {self.against!r}" if self.against else "")

    @property
    def adds_up(self) -> str:
        """The target and its parts, in words."""
        of = f" (the sum of {self.logits[0]} less that of {self.logits[1]})" if self.uneven else ""
        parts = ", ".join(f"{_PARTS[name]} {value:+.4g}" for name, value in self.parts.items() if value)
        return f"{_TARGETS[self.options.of]} {self.target:.4g}{of} = {parts}"

    @property
    def uneven(self) -> bool:
        """Whether the targets of the two answers that were contrasted sum different numbers of logits."""
        return len(set(self.logits)) > 1

    def strongest(self, n: int = 10) -> list[tuple[str, float]]:
        """The tokens with most relevance, for or against, and how much."""
        found = sorted(zip(self.tokens, self.relevance.tolist(), strict=True), key=lambda pair: -abs(pair[1]))
        return found[:n]

    def __repr__(self) -> str:
        shown = ", ".join(f"{token!r} {value:+.3g}" for token, value in self.strongest(3))
        error = f"conservation error {self.conservation_error:.1e}"
        return f"Explanation of {self.what}: {shown}; {self.adds_up}; {error}"

    def __rich__(self) -> Text:
        """The same in a terminal: `rich.print`, and ``holdfast explain``."""
        shown, most = Text(), float(self.relevance.abs().max()) or 1.0
        for number, (token, value) in enumerate(zip(self.tokens, self.relevance.tolist(), strict=True)):
            if number == self.asked:
                shown.append(" → ", style="dim")
            share = abs(value) / most
            of_sign = [int(part) for part in (_FOR if value > 0 else _AGAINST).split(",")]
            dark = ",".join(str(int(part * share)) for part in of_sign)
            shown.append(token.replace("\n", "↵\n"), style=f"white on rgb({dark})" if share > _SEEN else "")
        return shown

    def _repr_html_(self) -> str:
        """The tokens as a heat map, for a notebook."""
        most = float(self.relevance.abs().max()) or 1.0
        spans = []
        for number, (token, value) in enumerate(zip(self.tokens, self.relevance.tolist(), strict=True)):
            if number == self.asked:
                spans.append('<span style="opacity:.6"> → </span>')
            colour = f"rgba({_FOR if value > 0 else _AGAINST}, {abs(value) / most:.3f})"
            text = html.escape(token).replace("\n", "↵<br>")
            spans.append(f'<span style="background:{colour}" title="{value:+.4g}">{text}</span>')
        what = html.escape(self.answer)
        what += f" instead of {html.escape(self.against)}" if self.against else ""
        return (
            '<div style="font-family:ui-monospace,monospace;line-height:1.9;white-space:pre-wrap">'
            + "".join(spans)
            + '</div><div style="font-family:sans-serif;font-size:.85em;opacity:.8">'
            f"for <b>{what}</b>, {html.escape(self.adds_up)}; green speaks for it, red against; strongest "
            f"{most:.3g}; conservation error {self.conservation_error:.1e}</div>"
        )

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the heat map as an HTML file that needs nothing else.

        Raises
        ------
        StorageError
            It can't be written.
        """
        title = html.escape(f"Why {self.answer}")
        style = "body{max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
        write_text(
            file,
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{style}</style><body>{self._repr_html_()}</body></html>\n",
        )
        return Path(file)


def explain_answer(
    model: nn.Module, encoder: Encoder, example: Example, options: AttributionOptions
) -> Explanation:
    """The relevance of each token and weight for one answer.

    Raises
    ------
    DataError
        Prompt or answer has no tokens.
    UnruledOperationError, ConservationError
        As of `holdfast.attribution.attribute_one`.
    """
    tokenizer: Any = encoder.tokenizer
    row, fold = encoder(example), _Relevance()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ledger, shares, report = attribute_one(
        model, row, options=options, fold=fold, parameters=_rated(model), pad_id=pad_id
    )
    relevance = torch.cat(shares)
    # A starts below the head (`halves: path`): what the head takes was given on top, and is no part of it
    on_top = ledger.target / 2 if starts_below_head(options.rules, options.halves) else 0.0
    ids = row.prompt_ids + row.completion_ids
    # a causal model reads the last token too, but nothing that it answers depends on it
    if encoder.encoder_decoder:
        texts = [*_texts(tokenizer, row.prompt_ids), "", *_texts(tokenizer, row.completion_ids)[:-1]]
    else:
        texts, relevance = _texts(tokenizer, ids)[:-1], relevance[: len(ids) - 1]
    return Explanation(
        tokens=texts,
        relevance=relevance,
        asked=len(row.prompt_ids),
        answer=example.completion,
        target=ledger.target - on_top,
        weights=ImportancePrior(
            fold.tensors, {"importance": "relevance", "tasks": [], "unreached": list(report.unreached)}
        ),
        conservation_error=float(report.conservation_max_relative_error or 0.0),
        elsewhere={
            "biases": ledger.biases,
            "absorbed": float(sum(ledger.absorbed.values())),
            "created": ledger.created,
            "weights": ledger.weights - on_top,
        },
        logits=(1 if options.target == "first" else len(row.completion_ids),),
        options=options,
    )


def _rated(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that text goes through of the linear maps: those that are trained, or all if none is."""
    inside = {id(p) for p in text_part(model).parameters() if p.is_floating_point()}  # others are packed bits
    for trainable_only in (True, False):
        found = block_parameters(model, trainable_only=trainable_only)
        if rated := {name: p for name, p in found.items() if id(p) in inside}:
            return rated
    return {}


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands behind the one before: alone, many lose the blank before a word."""

    def text(*tokens: int) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    found = [text(token) for token in ids]
    for i, before in enumerate(found[:-1]):
        both = text(ids[i], ids[i + 1])
        if both.startswith(before):  # else the two are parts of one character
            found[i + 1] = both.removeprefix(before)
    return found
