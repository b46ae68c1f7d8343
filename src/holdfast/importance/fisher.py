"""Fisher: the diagonal that EWC uses (Kirkpatrick et al. 2017), per sample."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.config import Options
from holdfast.importance.aggregate import SquareMean
from holdfast.importance.gradients import fold_gradients
from holdfast.importance.registry import Computed, Inputs, register


class FisherOptions(Options):
    """Mean over samples of the squared gradient of the true answer's log-likelihood."""

    name: Literal["fisher"] = "fisher"
    samples: int = Field(128, ge=1, description="examples looked at, drawn by the run's seed")
    batch_size: int = Field(8, ge=1, description="examples a pass; no effect on the result")


@register(FisherOptions, needs_data=True)
def fisher(inputs: Inputs, options: FisherOptions) -> Computed:
    """1/S Σ_s (∂ log p(y_s | x_s) / ∂w)², log p summed over the answer's tokens, y_s the true answer.

    The gradient is squared for each sample, not for a batch, so the result does not depend on the batch
    size (a frequent mistake: a batch's squared mean gradient shrinks with the batch). It is the empirical
    Fisher: the labels are the data's, not drawn from the model.
    """
    return fold_gradients(
        inputs, SquareMean(per_weight=True), samples=options.samples, batch_size=options.batch_size
    )
