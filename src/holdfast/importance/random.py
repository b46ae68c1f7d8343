"""Random: the control that the referee of A missed."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.config import Options
from holdfast.importance.registry import Computed, Inputs, register
from holdfast.importance.seeding import seed_for


class RandomOptions(Options):
    """Uniform on [0, 1), by the run's seed: needs no data."""

    name: Literal["random"] = "random"


@register(RandomOptions, needs_data=False)
def random(inputs: Inputs, options: RandomOptions) -> Computed:
    """Values uniform on [0, 1); a tensor's values depend on its name and the seed alone."""
    return Computed(
        {
            name: torch.rand(p.shape, generator=torch.Generator().manual_seed(seed_for(name, inputs.seed)))
            for name, p in inputs.parameters.items()
        }
    )
