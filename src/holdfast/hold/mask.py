"""Mask: H is 1 where a weight is held and 0 elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.hold.operator import Rate


class Mask:
    """Whole rows, columns or single weights, held fully: earlier ranks of LoRA, units that MIGU leaves out.

    Parameters
    ----------
    held : list of Tensor of bool
        One for each weight, of a shape that broadcasts to it.
    """

    def __init__(self, held: list[Tensor]) -> None:
        self.held = held

    def blend_(
        self, values: Sequence[Tensor | None], towards: Sequence[Tensor], rate: Rate | None = None
    ) -> None:
        """See `Operator.blend_`. Held values become `towards` bit for bit; there is no part of a mask."""
        if rate is not None:
            raise ValueError("a mask holds fully or not at all: it takes no rate")
        for value, target, held in zip(values, towards, self.held, strict=True):
            if value is not None:
                value.copy_(torch.where(held, target, value))

    def reduce_(self, changes: Sequence[Tensor | None]) -> None:
        """See `Operator.reduce_`."""
        for change, held in zip(changes, self.held, strict=True):
            if change is not None:
                change.masked_fill_(held, 0.0)

    def times_(self, changes: Sequence[Tensor]) -> None:
        """See `Operator.times_`."""
        for change, held in zip(changes, self.held, strict=True):
            change.masked_fill_(~held, 0.0)

    def energy(self, changes: Sequence[Tensor]) -> Tensor:
        """See `Operator.energy`."""
        return torch.stack([(c**2 * held).sum() for c, held in zip(changes, self.held, strict=True)]).sum()
