"""What is attributed: the answer's logits (or log-probability), of samples that the model answers right."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from holdfast.errors import ModelError
from holdfast.models import evaluating, first_position, is_encoder_decoder, unwrapped
from holdfast.models.adapters import bare_of
from holdfast.tasks.encode import IGNORED, Encoded, collate


@dataclass
class Batch:
    """One batch, ready for the model.

    Attributes
    ----------
    inputs : dict
        Arguments of the model's forward.
    lengths : set of int
        Numbers of positions that activations of this batch can have.
    answer_ST : Tensor
        The token to predict at each of the last T logits' positions; -100 where there is none.
    real : list of Tensor
        Of each sequence, (S, T): False at padding.
    """

    inputs: dict[str, Any]
    lengths: set[int]
    answer_ST: Tensor
    real: list[Tensor]


def make_batch(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    side: Literal["left", "right"],
    *,
    apart: bool = False,
) -> Batch:
    """Collate rows; on the left, answers line up, so that logits are computed for the answer alone.

    With `apart` the sequences of encoder and decoder never have the same length (the decoder's gets one more
    position of padding), so that a sequence's length tells its mask.
    """
    model = unwrapped(model)
    base = bare_of(model)
    accepted = inspect.signature(base.forward).parameters
    encoder_decoder = is_encoder_decoder(model)
    batch = collate(
        rows,
        pad_id,
        encoder_decoder=encoder_decoder,
        side="right" if encoder_decoder else side,
        first_position=first_position(model),
    )
    inputs: dict[str, Any] = {key: value.to(device) for key, value in batch.items() if key in accepted}
    labels = inputs.pop("labels", batch["labels"].to(device))
    real = [batch["attention_mask"].to(device) != 0]
    if encoder_decoder:
        if apart and labels.shape[1] == real[0].shape[1]:
            labels = torch.cat([labels, labels.new_full((len(rows), 1), IGNORED)], dim=1)
        inputs["decoder_input_ids"] = decoder_inputs(base, labels, pad_id)
        answer_ST = labels
        real.append(labels != IGNORED)
    else:
        answer_ST = torch.cat([labels[:, 1:], labels.new_full((len(rows), 1), IGNORED)], dim=1)
        if side == "left" and "logits_to_keep" in accepted:
            keep = (
                max(len(row.completion_ids) for row in rows) + 1
            )  # one more: the position before the answer
            inputs["logits_to_keep"] = keep
            answer_ST = answer_ST[:, -keep:]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    lengths = {batch["input_ids"].shape[1], labels.shape[1], answer_ST.shape[1]}
    return Batch(inputs, lengths, answer_ST, real)


@torch.no_grad()
def pass_through(model: Any, rows: Sequence[Encoded], pad_id: int, hooks: Sequence[RemovableHandle]) -> None:
    """Rows through the model one by one, prompt and answer, for hooks to watch, which are then removed.

    There is no padding to be told apart.
    """
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for row in rows:
                model(**make_batch(model, [row], pad_id, device, "left").inputs)
    finally:
        for hook in hooks:
            hook.remove()


def decoder_inputs(model: Any, labels_ST: Tensor, pad_id: int) -> Tensor:
    """What a decoder reads while it is taught `labels_ST` (-100 where there is no token).

    Raises
    ------
    ModelError
        The model has no token for its decoder to start with.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    starts = [getattr(c, "decoder_start_token_id", None) for c in (model.config, model.generation_config)]
    start = next((token for token in starts if token is not None), None)
    if prepare is not None and (
        start is None or getattr(model.config, "decoder_start_token_id", None) == start
    ):
        try:
            return prepare(labels=labels_ST)
        except (AttributeError, ValueError):  # it asks its configuration for a token that it doesn't have
            pass
    if start is None:
        raise ModelError(
            f"{type(model).__name__}: it has no token for its decoder to start with. Set "
            "model.config.decoder_start_token_id (often the id of the padding or of the end token)."
        )
    shifted_ST = torch.cat([torch.full_like(labels_ST[:, :1], start), labels_ST[:, :-1]], dim=1)
    return shifted_ST.masked_fill(shifted_ST == IGNORED, pad_id)


def correct(logits_STV: Tensor, answer_ST: Tensor) -> Tensor:
    """Whether the argmax of the teacher-forced logits reproduces every answer token -> (S,) bool."""
    right_ST = (logits_STV.argmax(dim=-1) == answer_ST) | (answer_ST == IGNORED)
    return right_ST.all(dim=1)


def initial_lambda(
    logits_STV: Tensor,
    answer_ST: Tensor,
    *,
    target: Literal["all", "first"],
    of: Literal["logit", "log_probability"],
) -> Tensor:
    """Lambda of the logits: the derivative of the target by them.

    Parameters
    ----------
    logits_STV : Tensor
    answer_ST : Tensor
        -100 where nothing is predicted.
    target : {"all", "first"}
        All answer tokens, or the first one of each sample.
    of : {"logit", "log_probability"}
        One at the answer's token, or that minus the probabilities.

    Returns
    -------
    Tensor, shape (S, T, V)
    """
    counted_ST = answer_ST != IGNORED
    if target == "first":
        counted_ST &= counted_ST.cumsum(dim=1) == 1
    lam_STV = torch.zeros_like(logits_STV)
    lam_STV.scatter_(2, answer_ST.clamp(min=0).unsqueeze(-1), 1.0)
    if of == "log_probability":
        wide = torch.promote_types(logits_STV.dtype, torch.float32)
        lam_STV -= torch.softmax(logits_STV, dim=-1, dtype=wide).to(logits_STV.dtype)
    return lam_STV * counted_ST.unsqueeze(-1)


def module_names(model: nn.Module) -> dict[int, str]:
    """id of each module to its name."""
    return {id(module): name for name, module in model.named_modules()}
