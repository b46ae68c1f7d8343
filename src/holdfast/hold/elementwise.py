"""Elementwise: H Δ = h ⊙ Δ, a held share for each weight by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from holdfast.hold.operator import Rate


class Elementwise:
    """A share for each weight: an importance prior, KIF's fusion, a weight ensemble.

    Parameters
    ----------
    shares : list of Tensor, or float
        h in the weights' device and dtype, one tensor a weight; used as they are. A number is the share of
        all. Only with a rate may they exceed 1.

    Notes
    -----
    Exact at both ends: where h = 1 the value becomes `towards` bit for bit, where h = 0 it stays.
    """

    def __init__(self, shares: list[Tensor] | float) -> None:
        self.shares: Any = shares

    @cached_property
    def _passed(self) -> list[Tensor]:
        return [1 - share for share in self.shares]

    def blend_(
        self, values: Sequence[Tensor | None], towards: Sequence[Tensor], rate: Rate | None = None
    ) -> None:
        """See `Operator.blend_`."""
        there = [at for at, value in enumerate(values) if value is not None]
        moved = [value for value in values if value is not None]
        if not moved:
            return
        shares: Any = self.shares  # of each weight, or one number
        if isinstance(shares, list):
            shares = [shares[at] for at in there]
        if rate is not None:
            shares = torch._foreach_mul(shares, rate)
            torch._foreach_clamp_max_(shares, 1.0)
            shares = [share.to(value.dtype) for share, value in zip(shares, moved, strict=True)]
        torch._foreach_lerp_(moved, [towards[at] for at in there], shares)

    def reduce_(self, changes: Sequence[Tensor | None]) -> None:
        """See `Operator.reduce_`."""
        pairs = [(c, p) for c, p in zip(changes, self._passed, strict=True) if c is not None]
        if pairs:
            torch._foreach_mul_([change for change, _ in pairs], [passed for _, passed in pairs])

    def times_(self, changes: Sequence[Tensor]) -> None:
        """See `Operator.times_`."""
        torch._foreach_mul_(list(changes), self.shares)

    def energy(self, changes: Sequence[Tensor]) -> Tensor:
        """See `Operator.energy`."""
        parts = [(h * change**2).sum() for h, change in zip(self.shares, changes, strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
