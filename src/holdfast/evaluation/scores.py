"""Scores of one answer, 0 to 100."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from holdfast.tasks.task import MetricName

Score = Callable[[str, Sequence[str]], float]


def normalise(text: str) -> str:
    """Answers are compared without case and with runs of white space as one blank."""
    return " ".join(text.split()).casefold()


def exact_match(generated: str, expected: Sequence[str]) -> float:
    """100 if the answer equals one of the expected ones after `normalise`, else 0."""
    return 100.0 * (normalise(generated) in {normalise(e) for e in expected})


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(generated: str, expected: Sequence[str]) -> float:
    """ROUGE-L F-measure, times 100, of the best reference (through `rouge-score`, with stemming)."""
    return 100.0 * max(_rouge().score(reference, generated)["rougeL"].fmeasure for reference in expected)


SCORES: dict[MetricName, Score] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "options": exact_match,  # the answer is already one of the options: generate.rank_options chose it
}
