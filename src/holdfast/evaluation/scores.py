"""Scores of one answer, 0 to 100."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from holdfast.tasks.opening import common_beginning
from holdfast.tasks.task import MetricName

Score = Callable[[str, Sequence[str]], float]
Grams = Counter[tuple[str, ...]]
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


def choice(generated: str, expected: Sequence[str]) -> float:
    """100 if the answer begins with the letter that an expected one begins with: "B" and "B. Because"."""
    letter = normalise(generated)[:1]
    rest = normalise(generated)[1:2]
    return 100.0 * (not rest.isalnum() and letter in {normalise(e)[:1] for e in expected} - {""})


def edit_similarity(generated: str, expected: Sequence[str]) -> float:
    """100 x 2 L / (a + b), the best of the references: L the longest common subsequence of characters.

    That is the ratio of two texts (of a and b characters) under insertions and deletions alone, as TRACE
    scores completed code. White space at either end doesn't count; case does.
    """
    return max(_ratio(generated.strip(), reference.strip()) for reference in expected)


def _ratio(a: str, b: str) -> float:
    if not a or not b:
        return 100.0 * (a == b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    whole = (1 << len(a)) - 1
    row = whole  # a zero bit for each character of `a` in a longest common subsequence so far (Hyyrö 2004)
    for character in b:
        met = row & places.get(character, 0)
        row = ((row + met) | (row - met)) & whole
    return 200.0 * (len(a) - row.bit_count()) / (len(a) + len(b))


def sari(generated: str, expected: Sequence[str], source: str) -> float:
    """SARI of one text, 0 to 100: what was kept, added and taken away beside a source (Xu et al. 2016).

    The mean over 1- to 4-grams of words of F1 of what is kept, F1 of what is added, and precision of what is
    deleted; where there is nothing to keep, to add or to delete, that part counts as 1. Kept n-grams count by
    how many references have them.
    """
    parts = [
        _sari_of(_grams(source, n), _grams(generated, n), [_grams(e, n) for e in expected])
        for n in range(1, 5)
    ]
    return 100.0 * sum(parts) / len(parts)


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", normalise(text))
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _sari_of(source: Grams, system: Grams, references: Sequence[Grams]) -> float:
    """Of the n-grams of one length."""
    times = len(references)
    wanted = sum(references, Counter[tuple[str, ...]]())
    old, new = (Counter({g: times * c for g, c in grams.items()}) for grams in (source, system))
    kept, keep = old & new, old & wanted
    right = kept & wanted
    keep_f1 = _f1(_mean(right[g] / c for g, c in kept.items()), _mean(right[g] / c for g, c in keep.items()))
    gone = old - new
    deleted = _mean((gone - wanted)[g] / c for g, c in gone.items())
    added, add = set(system) - set(source), set(wanted) - set(source)
    good = added & set(wanted)
    add_f1 = _f1(_mean(g in good for g in added), _mean(g in good for g in add))
    return (keep_f1 + deleted + add_f1) / 3


def _mean(shares: Iterable[float]) -> float:
    values = list(shares)
    return sum(values) / len(values) if values else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def sources_of(prompts: Sequence[str]) -> list[str]:
    """Prompts without what all of them begin and end with: the texts that SARI compares with.

    An instruction counted as source would reward every answer for having deleted it.
    """
    first = len(common_beginning([*map(ord, prompt)] for prompt in prompts))
    rest = [prompt[first:] for prompt in prompts]
    last = len(common_beginning([*map(ord, text[::-1])] for text in rest))
    return [text[: len(text) - last].strip() for text in rest]


METRICS: dict[MetricName, str] = {
    "exact_match": "all answers equal one of the expected ones, but for case and white space",
    "rouge_l": "all answers have the words of an expected one in their order (F-measure)",
    "options": "of the allowed answers the likeliest is the right one, always",
    "perplexity": "the true answers are certain: the score is 100 / perplexity",
    "choice": "the answer begins with the letter of an expected one",
    "edit_similarity": "all answers equal an expected one, character by character (2 L / (a + b))",
    "sari": "what is kept, added and taken away beside the source is what the references do",
}
SCORES: dict[MetricName, Score] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "choice": choice,
    "edit_similarity": edit_similarity,
    "options": exact_match,  # the answer is already one of the options: generate.rank_options chose it
}  # "perplexity" asks for no answer: evaluate.perplexities
