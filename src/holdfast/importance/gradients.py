"""The pass that the importances made of plain gradients share: they differ in how samples are folded."""

from __future__ import annotations

from holdfast.attribution.engine import per_sample_gradients
from holdfast.importance.aggregate import AbsoluteMean, SquareMean
from holdfast.importance.registry import Computed, Inputs, sample_counts
from holdfast.importance.seeding import sample


def fold_gradients(
    inputs: Inputs, fold: AbsoluteMean | SquareMean, *, samples: int, batch_size: int
) -> Computed:
    """Fold the gradients of log p(y_s | x_s), summed over the answer's tokens, of `samples` rows of the data.

    Samples are drawn by ``inputs.seed``; all count, answered right or wrong. `batch_size` is how many go
    through the model at once and has no effect on the result.
    """
    report = per_sample_gradients(
        inputs.model,
        sample(inputs.rows, samples, inputs.seed),
        fold=fold,
        parameters=inputs.parameters,
        batch_size=batch_size,
        pad_id=inputs.pad_id,
        progress=inputs.progress,
        partial=inputs.partial,
    )
    return Computed(fold.result(), sample_counts(report))
