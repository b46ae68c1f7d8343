"""Magnitude: the absolute value of a weight, as pruning uses it."""

from __future__ import annotations

from typing import Literal

from holdfast.config import Options
from holdfast.importance.registry import Computed, Inputs, register


class MagnitudeOptions(Options):
    """|w|: needs no data."""

    name: Literal["magnitude"] = "magnitude"


@register(MagnitudeOptions, needs_data=False)
def magnitude(inputs: Inputs, options: MagnitudeOptions) -> Computed:
    """|w| of every weight."""
    return Computed({name: p.detach().abs().float() for name, p in inputs.parameters.items()})
