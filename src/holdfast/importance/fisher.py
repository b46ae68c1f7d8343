"""Fisher: the diagonal that EWC uses (Kirkpatrick et al. 2017), per sample."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.attribution.engine import per_sample_gradients
from holdfast.config import Options
from holdfast.importance.aggregate import SquareMean
from holdfast.importance.registry import Computed, Inputs, register, sample_counts
from holdfast.importance.seeding import sample


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
    rows = sample(inputs.rows, options.samples, inputs.seed)
    fold = SquareMean(per_weight=True)
    report = per_sample_gradients(
        inputs.model,
        rows,
        fold=fold,
        parameters=inputs.parameters,
        batch_size=options.batch_size,
        pad_id=inputs.pad_id,
        progress=inputs.progress,
    )
    return Computed(fold.result(), sample_counts(report))
