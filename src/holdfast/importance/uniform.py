"""Uniform: every weight matters the same. What a mechanism does without any attribution."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.config import Options
from holdfast.importance.registry import Computed, Inputs, register


class UniformOptions(Options):
    """1 for every weight: needs no data."""

    name: Literal["uniform"] = "uniform"


@register(UniformOptions, needs_data=False)
def uniform(inputs: Inputs, options: UniformOptions) -> Computed:
    """1 for every weight."""
    return Computed({name: torch.ones(p.shape) for name, p in inputs.parameters.items()})
