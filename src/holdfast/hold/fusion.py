"""Fusion: old and new weights averaged unit by unit (K, section IV-D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from holdfast.config import Options, named
from holdfast.hold.elementwise import Elementwise
from holdfast.importance.skill_units import SkillUnit, important, normalised


class StaticFusionOptions(Options):
    """Four cases by which of both sides calls a unit important (K, eq. 15)."""

    name: Literal["static"] = "static"
    gamma: float = Field(0.5, ge=0, le=1, description="share of the old weights where both need the unit")


class AdaptiveFusionOptions(Options):
    """Shares by a softmax over both sides' scores (K, eqs. 16 and 17)."""

    name: Literal["adaptive"] = "adaptive"
    tau: float = Field(0.15, gt=0, description="temperature")


class OnlineFusionOptions(Options):
    """Adaptive shares, applied during the training instead of after it (ours, after K's conclusion)."""

    name: Literal["online"] = "online"
    tau: float = Field(0.15, gt=0, description="temperature")
    every: int = Field(50, ge=1, description="optimizer steps between two fusions; about three times a task")


_Union: Any = Union[StaticFusionOptions, AdaptiveFusionOptions, OnlineFusionOptions]  # noqa: UP007
FusionOptions: Any = Annotated[_Union, Field(discriminator="name"), BeforeValidator(named)]


def old_shares(old: Tensor, new: Tensor, options: Any, rule: float | Literal["distribution"] = 0.2) -> Tensor:
    """The share of the old weights in each unit, (units,) in [0, 1].

    Parameters
    ----------
    old, new : Tensor, shape (units,)
        Accumulated scores of the tasks before, and scores of this task. Both are normalised here (Norm of
        eq. 13), where the paper has raw scores for the first task in eq. 16: raw ones are so small that
        every exponential would be 1.
    options : StaticFusionOptions, AdaptiveFusionOptions or OnlineFusionOptions
    rule : float or "distribution"
        Static fusion only: which units are `important`.
    """
    old, new = normalised(old), normalised(new)
    if not isinstance(options, StaticFusionOptions):
        return torch.sigmoid((old - new) / options.tau)  # = exp(old/τ) / (exp(old/τ) + exp(new/τ))
    old_needs, new_needs = important(old, rule), important(new, rule)
    share = torch.full_like(old, 0.5)
    share[old_needs & ~new_needs] = 1.0
    share[~old_needs & new_needs] = 0.0
    share[old_needs & new_needs] = options.gamma
    return share


@torch.no_grad()
def fuse(
    units: Sequence[SkillUnit],
    parameters: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    share: Tensor,
    averaged: Literal["factors", "product"] = "factors",
) -> None:
    """Blend the old weights into the present ones, in place: u ← share u_old + (1 − share) u.

    Parameters
    ----------
    parameters, old : mapping of str to Tensor
        Canonical name to the present and the old weights.
    share : Tensor, shape (units,)
        Of the old weights: at 1 the unit becomes the old one bit for bit, at 0 it stays.
    averaged : {"factors", "product"}
        Of a LoRA unit, b and a each by themselves (as the authors' code does), or the product b a. The
        average of two products has rank 2; the unit becomes the nearest of rank 1.
    """
    for unit, keep in zip(units, share.tolist(), strict=True):
        now = [part.of(parameters[part.parameter]) for part in unit.slices]
        before = [part.of(old[part.parameter]) for part in unit.slices]
        if averaged == "product" and len(now) == 2 and 0 < keep < 1:
            _fuse_product(now[0], now[1], before[0], before[1], keep)
            continue
        earlier = [part.to(value) for part, value in zip(before, now, strict=True)]
        Elementwise(keep).blend_(now, earlier)


def _fuse_product(a_I: Tensor, b_O: Tensor, old_a_I: Tensor, old_b_O: Tensor, keep: float) -> None:
    """a, b ← the rank 1 matrix nearest to keep b_old a_old + (1 − keep) b a, with |a| as it was."""
    left_O2 = torch.stack([keep * old_b_O.double(), (1 - keep) * b_O.double()], dim=1)
    right_I2 = torch.stack([old_a_I.double(), a_I.double()], dim=1)
    q_O2, r_left = torch.linalg.qr(left_O2)
    q_I2, r_right = torch.linalg.qr(right_I2)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)  # 2 x 2
    size = a_I.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
    direction_I, image_O = q_I2 @ vh[0], q_O2 @ u[:, 0] * s[0]
    sign = 1.0 if direction_I @ a_I.double() >= 0 else -1.0
    a_I.copy_(sign * size * direction_I)
    b_O.copy_(sign / size * image_O)
