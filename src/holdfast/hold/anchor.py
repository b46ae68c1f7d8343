"""Anchor: a decoupled elastic pull back to the weights at the end of the last task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options, validate
from holdfast.hold.attach import (
    Handle,
    bind,
    blend_,
    held_summary,
    hook,
    logarithmic_summary,
    place,
    reference_weights,
)
from holdfast.importance.prior import ImportancePrior


class AnchorOptions(Options):
    """Pull each weight back after every step, the harder the more important it is."""

    name: Literal["anchor"] = "anchor"
    strength: float = Field(600.0, ge=0, description="λ: a weight of mean importance is pulled by η·λ a step")


class Anchor:
    """After each optimizer step: θ ← θ* + (1 − min(1, η·λ·I)) ⊙ (θ − θ*).

    It is to EWC's penalty what AdamW is to L2 regularisation: the pull doesn't pass through Adam's
    normalisation, so its strength means the same for every weight.

    Parameters
    ----------
    prior : ImportancePrior
        I; negative values count as 0, then the mean over all weights is scaled to 1.
    strength : float
        λ. η is the learning rate of the weight's parameter group, read at each step.
    reference : mapping of str to Tensor, optional
        θ*, by canonical name; copies of the weights at `attach` when omitted.

    Notes
    -----
    Where η·λ·I ≥ 1 the weight equals θ* bit for bit after every step. Memory, in the parameters' dtype:
    I and θ* (2 values per protected weight), and temporarily η·λ·I for at most 64 M weights at a time. In
    16-bit dtypes a pull below the weight's own rounding is lost, like any small update there.
    """

    def __init__(
        self,
        prior: ImportancePrior,
        *,
        strength: float = 600.0,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.prior = prior
        self.options = validate(AnchorOptions, {"strength": strength}, "Anchor")
        self.reference = reference
        self.learning_rate: float | None = None  # the largest seen, for the summary

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Pull after every step of this optimizer until the handle is removed.

        Raises
        ------
        PriorMismatchError
            The prior or the reference doesn't fit the model, or the optimizer holds none of the weights.
        """
        inner, chunks = bind(self.prior, model, optimizer)
        importance = self.prior.mean_normalised().tensors
        strengths = [
            [
                place(importance[name] * self.options.strength, parameter)
                for name, parameter in zip(chunk.names, chunk.parameters, strict=True)
            ]
            for chunk in chunks
        ]
        references = [reference_weights(chunk, self.reference, "anchor") for chunk in chunks]
        for group in inner.param_groups:  # a scheduler with warm-up has set lr to 0 by now
            self._saw(group.get("initial_lr", group["lr"]))

        def pull() -> None:
            for chunk, strength, reference in zip(chunks, strengths, references, strict=True):
                rate = inner.param_groups[chunk.group]["lr"]
                self._saw(rate)
                weight = torch._foreach_mul(strength, rate)
                torch._foreach_clamp_max_(weight, 1.0)
                blend_(chunk.parameters, reference, weight)

        return hook(inner, after=pull)

    def _saw(self, rate: float | Tensor) -> None:
        if not isinstance(rate, Tensor):  # a tensor lr may live on a GPU: reading it would stall each step
            self.learning_rate = max(self.learning_rate or 0.0, rate)
        elif self.learning_rate is None:
            self.learning_rate = float(rate)

    def summary(self) -> dict[str, Any]:
        """Distribution of the pull min(1, η·λ·I) at the largest learning rate so far.

        Before `attach` η is unknown: then of λ·I, the pull for each unit of learning rate.
        """
        strength, tensors = self.options.strength, self.prior.mean_normalised().tensors
        if self.learning_rate is None:
            result = logarithmic_summary(
                lambda: (tensor * strength for tensor in tensors.values()), "pull per step / learning rate"
            )
            return {**result, "held": None}
        factor = strength * self.learning_rate
        result = held_summary(
            lambda: ((tensor * factor).clamp_(max=1.0) for tensor in tensors.values()), "pull per step"
        )
        return {**result, "learning_rate": self.learning_rate}
