"""Attribution: the relevance of every weight for a model's answers (A, section 4.1)."""

from __future__ import annotations

from holdfast.attribution.engine import (
    AttributionOptions,
    AttributionReport,
    attribute_batches,
    attribute_one,
    per_sample_gradients,
)
from holdfast.attribution.maps import Fold, TokenFold

__all__ = [
    "AttributionOptions",
    "AttributionReport",
    "Fold",
    "TokenFold",
    "attribute_batches",
    "attribute_one",
    "per_sample_gradients",
]
