"""The loss of each answer token: cross-entropy, or one that takes less away from what the base can do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.config import Options, named
from holdfast.models.base import Base


class CrossEntropyOptions(Options):
    """Next-token cross-entropy, each token alike."""

    name: Literal["cross_entropy"] = "cross_entropy"


class EaftOptions(Options):
    """Cross-entropy, weighted by how unsure the model is: what it is sure of it unlearns less."""

    name: Literal["eaft"] = "eaft"
    top: int = Field(20, ge=2, description="the entropy is that of so many likeliest tokens (the paper's K)")


class KlToBaseOptions(Options):
    """Cross-entropy + weight × KL(base || now), on the answer tokens of the new rows."""

    name: Literal["kl_to_base"] = "kl_to_base"
    weight: float = Field(1.0, gt=0)


LossOptions = Annotated[
    Annotated[CrossEntropyOptions | EaftOptions | KlToBaseOptions, Field(discriminator="name")],
    BeforeValidator(named),
]


def normalised_entropy(logits_NV: Tensor, top: int = 20) -> Tensor:
    """Entropy of the `top` likeliest tokens' distribution, made to sum to 1, over ln `top`.

    That is H_t / ln K of EAFT (Diao et al. 2026, arXiv 2601.02151). No gradient goes through it.

    Parameters
    ----------
    top : int
        At most the vocabulary's size, which takes its place where it is smaller.

    Returns
    -------
    Tensor
        (N,) float32 in [0, 1]: 0 where one token has all the probability, 1 where all have the same.
    """
    kept = min(top, logits_NV.shape[-1])
    log_p_NK = F.log_softmax(logits_NV.detach().float().topk(kept, dim=-1).values, dim=-1)
    return (-(log_p_NK.exp() * log_p_NK).sum(-1) / math.log(kept)).clamp(0, 1)


def divergence(base_NV: Tensor, now_NV: Tensor) -> Tensor:
    """KL(base || now) at each of N positions, in nats, (N,) float32, from logits."""
    base, now = F.log_softmax(base_NV.float(), dim=-1), F.log_softmax(now_NV.float(), dim=-1)
    return F.kl_div(now, base, reduction="none", log_target=True).sum(-1)


class TokenLoss:
    """The loss of each answer token of a batch under some options.

    Parameters
    ----------
    options : EaftOptions or KlToBaseOptions
        Plain cross-entropy is `holdfast.training.bridge.completion_loss`.
    base : Base, optional
        For `kl_to_base`.
    """

    def __init__(self, options: EaftOptions | KlToBaseOptions, base: Base | None = None) -> None:
        self.options, self.base = options, base

    @classmethod
    def of(cls, options: Any, base: Base | None) -> TokenLoss | None:
        """What the options ask for; None for plain cross-entropy."""
        return None if isinstance(options, CrossEntropyOptions) else cls(options, base)

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        logits_NV: Tensor,
        targets_N: Tensor,
        place_SL: Tensor,
    ) -> Tensor:
        """The tokens' losses, (N,) float32.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            What the model was called with.
        logits_NV, targets_N : Tensor
            What it put out where an answer token is predicted, and these tokens.
        place_SL : Tensor
            Bool: where they stand among the last L positions of the output.
        """
        losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
        if isinstance(self.options, EaftOptions):
            return normalised_entropy(logits_NV, self.options.top) * losses_N
        if self.base is None:
            raise ValueError("TokenLoss: kl_to_base needs the base")
        with torch.no_grad(), self.base.answering(model) as base:
            base_NV = base(**inputs).logits[:, -place_SL.shape[1] :][place_SL]
        return losses_N + self.options.weight * divergence(base_NV, logits_NV)
