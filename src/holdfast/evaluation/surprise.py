"""Which rows of a task surprise the model most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from holdfast.evaluation.answers import Progress, log_likelihoods
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Example


@torch.no_grad()
def surprises(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[float]:
    """-log p of each row's answer, a token: nats (SuRe, Hazard et al. 2025, arXiv 2511.22367).

    SuRe ranks by the whole sequence, and averages a fast and a slow LoRA besides; here the answer alone
    counts, asked once the task is learned, and nothing is averaged.
    """
    rows, found = encoder.many(examples), []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        sums = log_likelihoods(model, encoder.tokenizer, part).tolist()
        found += [-total / len(row.completion_ids) for total, row in zip(sums, part, strict=True)]
        if progress is not None:
            progress(len(found), len(rows))
    return found


def most_surprising(examples: Sequence[Example], surprise: Sequence[float], count: int) -> list[Example]:
    """The `count` rows of largest surprise, in the order that they have."""
    first = sorted(range(len(examples)), key=lambda i: (-surprise[i], i))[:count]
    return [examples[i] for i in sorted(first)]
