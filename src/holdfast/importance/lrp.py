"""LRP: the relevance of each weight for the model's own answers (A, section 4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from holdfast.attribution.engine import AttributionOptions, AttributionReport, attribute_batches
from holdfast.config import Options
from holdfast.importance.aggregate import AbsoluteMean, SquareMean, TopKMean
from holdfast.importance.heads import PerHead, splits_of
from holdfast.importance.registry import Computed, Inputs, register, sample_counts
from holdfast.importance.right_rows import of_right_rows
from holdfast.importance.seeding import sample


class _Lrp(Options):
    name: Literal["lrp"] = "lrp"  # a base, so that it comes first where options are written


class LrpOptions(AttributionOptions, _Lrp):
    """Relevance of each weight for right answers; the defaults are the form that worked best."""

    aggregate: Literal["topk", "absolute", "square"] = Field(
        "square", description="over samples: eqs. 10 and 11 | mean of |R| | mean of R²"
    )
    per_weight: bool = Field(True, description="fold R/w, the relevance of a unit of weight, instead of R")
    top_k: int | None = Field(None, ge=1, description="topk only: K of eq. 11 (default 8)")
    samples: int = Field(128, ge=1, description="examples looked at, drawn by the run's seed")
    batch_size: int = Field(8, ge=1, description="examples a pass; no effect on the result")
    memory_budget: int | None = Field(
        None, ge=1, description="bytes that the fold may take; more passes over the data stay below it"
    )
    correct_only: bool = Field(
        True, description="only examples that the model answers right, as A does; all if there are none"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> LrpOptions:
        if self.top_k is not None and self.aggregate != "topk":
            raise ValueError(f"`top_k` applies to `aggregate: topk` only, not to `{self.aggregate}`")
        return self

    @property
    def folded(self) -> int:
        """Values of each weight that are held while samples are folded: K of eq. 11, or one."""
        return (self.top_k or 8) if self.aggregate == "topk" else 1


@register(LrpOptions, needs_data=True, every_weight=False)
def lrp(inputs: Inputs, options: LrpOptions) -> Computed:
    """Layer-wise relevance of each weight, folded over samples (A, eqs. 5 to 11).

    A to the letter: ``rules="paper", halves="path", target="first", aggregate="topk", per_weight=False``.
    """
    rows = sample(inputs.rows, options.samples, inputs.seed)
    fold = _fold(inputs, options)

    def attribute(correct_only: bool) -> AttributionReport:
        return attribute_batches(
            inputs.model,
            rows,
            options=options,
            fold=fold,
            parameters=inputs.parameters,
            batch_size=options.batch_size,
            memory_budget=options.memory_budget,
            pad_id=inputs.pad_id,
            correct_only=correct_only,
            progress=inputs.progress,
            partial=inputs.partial,
        )

    report, right = of_right_rows(inputs, attribute, options.correct_only)
    return Computed(
        fold.result(),
        {
            **sample_counts(report),
            **right,
            "conservation_max_relative_error": report.conservation_max_relative_error,
            "absorbed": report.absorbed,
            "created": report.created,
        },
    )


def _fold(inputs: Inputs, options: LrpOptions) -> PerHead | TopKMean | AbsoluteMean | SquareMean:
    if options.aggregate == "topk":
        fold = TopKMean(options.folded, per_weight=options.per_weight)
        return PerHead(fold, splits_of(inputs.model)) if options.rules == "paper" else fold
    if options.aggregate == "absolute":
        return AbsoluteMean(per_weight=options.per_weight)
    return SquareMean(per_weight=options.per_weight)
