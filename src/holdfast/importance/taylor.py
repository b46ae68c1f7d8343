"""Taylor: how much the loss would change to first order if a weight were removed (Molchanov et al. 2019)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.config import Options
from holdfast.importance.aggregate import AbsoluteMean
from holdfast.importance.gradients import fold_gradients
from holdfast.importance.registry import Computed, Inputs, register


class TaylorOptions(Options):
    """Mean over samples of |w · gradient of the true answer's log-likelihood|."""

    name: Literal["taylor"] = "taylor"
    samples: int = Field(128, ge=1, description="examples looked at, drawn by the run's seed")
    batch_size: int = Field(8, ge=1, description="examples a pass; no effect on the result")


@register(TaylorOptions, needs_data=True)
def taylor(inputs: Inputs, options: TaylorOptions) -> Computed:
    """1/S Σ_s |w · ∂ log p(y_s | x_s) / ∂w|, log p summed over the answer's tokens, y_s the true answer."""
    return fold_gradients(inputs, AbsoluteMean(), samples=options.samples, batch_size=options.batch_size)
