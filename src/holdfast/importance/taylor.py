"""Taylor: how much the loss would change to first order if a weight were removed (Molchanov et al. 2019)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from holdfast.config import Options
from holdfast.importance.registry import Computed, Inputs, register
from holdfast.importance.seeding import sample


class TaylorOptions(Options):
    """Mean over samples of |w · gradient of the true answer's log-likelihood|."""

    name: Literal["taylor"] = "taylor"
    samples: int = Field(128, ge=1, description="examples looked at, drawn by the run's seed")
    batch_size: int = Field(8, ge=1, description="examples a pass; no effect on the result")


class _AbsoluteSum:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        total = weight.detach().float().abs() * grad_S.float().abs().sum(0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total


@register(TaylorOptions, needs_data=True)
def taylor(inputs: Inputs, options: TaylorOptions) -> Computed:
    """1/S Σ_s |w · ∂ log p(y_s | x_s) / ∂w|, log p summed over the answer's tokens, y_s the true answer."""
    from holdfast.attribution.engine import per_sample_gradients

    rows = sample(inputs.rows, options.samples, inputs.seed)
    fold = _AbsoluteSum()
    per_sample_gradients(
        inputs.model,
        rows,
        fold=fold,
        parameters=inputs.parameters,
        batch_size=options.batch_size,
        pad_id=inputs.pad_id,
        progress=inputs.progress,
    )
    return Computed(
        {name: total / len(rows) for name, total in fold.sums.items()},
        {"samples_seen": len(rows), "samples_used": len(rows)},
    )
