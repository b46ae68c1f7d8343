"""Scores of one answer, 0 to 100."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from holdfast.tasks.task import MetricName

Score = Callable[[str, Sequence[str]], float]
# words, but a letter of a script without blanks (Chinese, Japanese kana) is one by itself
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


def normalise(text: str) -> str:
    """Answers are compared without case, with runs of white space as one blank, and in one Unicode form.

    The form is NFKC: tokenizers write what looks the same in different ways (T5 writes ① as 1).
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def exact_match(generated: str, expected: Sequence[str]) -> float:
    """100 if the answer equals one of the expected ones after `normalise`, else 0."""
    return 100.0 * (normalise(generated) in {normalise(e) for e in expected})


class _Words:
    """`rouge-score`'s words for ASCII texts; for others, which it would drop, words of any script."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        text = normalise(text)
        found: list[str] = []
        for word in _WORD.findall(text):
            found += self._ascii.tokenize(word) if word.isascii() else [word]
        return found


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(generated: str, expected: Sequence[str]) -> float:
    """ROUGE-L F-measure, times 100, of the best reference (through `rouge-score`, with stemming).

    A reference without any word, such as ``?``, is compared as `exact_match` does.
    """
    return max(_rouge_of(generated, reference) for reference in expected)


def _rouge_of(generated: str, reference: str) -> float:
    if not _WORD.search(normalise(reference)):
        return exact_match(generated, [reference])
    return 100.0 * float(_rouge().score(reference, generated)["rougeL"].fmeasure)


METRICS: dict[MetricName, str] = {
    "exact_match": "all answers equal one of the expected ones, but for case and white space",
    "rouge_l": "all answers have the words of an expected one in their order (F-measure)",
    "options": "of the allowed answers the likeliest is the right one, always",
    "perplexity": "the true answers are certain: the score is 100 / perplexity",
}
SCORES: dict[MetricName, Score] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "options": exact_match,  # the answer is already one of the options: generate.rank_options chose it
}  # "perplexity" asks for no answer: evaluate.perplexities
