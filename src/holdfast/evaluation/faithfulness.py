"""Is importance faithful? Zero the top weights after training and see how fast the accuracy falls.

The check that a referee of A asked for: against the same number of weights chosen at random, and by
magnitude, in each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.evaluation.evaluate import EvaluationOptions, encode_task, evaluate_encoded
from holdfast.records import Faithfulness
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Task

PERCENT = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
Curves = Mapping[str, list[float]]  # choice to accuracy at each share
CHOICES = ("importance", "random", "magnitude")


def measure_faithfulness(
    model: Any,
    tokenizer: Any,
    task: Task,
    encoder: Encoder,
    *,
    importance: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    percent: Sequence[float] = PERCENT,
    options: EvaluationOptions | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    known: Curves | None = None,
    keep: Callable[[Curves], None] | None = None,
) -> Faithfulness:
    """Accuracy on the task's test rows with the top p % of each tensor set to zero.

    Parameters
    ----------
    importance : mapping
        Canonical name to a tensor of the parameter's shape; higher is more important.
    parameters : mapping
        The weights to ablate, by the same names. They are restored, bit for bit.
    percent : sequence of float
        Shares of each tensor, in percent.
    known : mapping of str to list of float
        The points of an earlier call with the same arguments, in the order of `percent`; not measured again.
    keep : callable
        Called with all points so far after each.

    Returns
    -------
    Faithfulness
        As it is written to ``faithfulness.json``.
    """
    options = options or EvaluationOptions()
    encoded = encode_task(task, encoder, options)
    curves = {choice: list((known or {}).get(choice, [])) for choice in CHOICES}
    total, done = len(CHOICES) * len(percent), sum(map(len, curves.values()))
    for choice, curve in curves.items():
        scores = _ranking(choice, importance, parameters, seed)
        for share in percent[len(curve) :]:
            with _zeroed(parameters, scores, share / 100.0):
                result = evaluate_encoded(model, tokenizer, encoded, batch_size=options.batch_size)
            curve.append(result.score)
            done += 1
            if keep is not None:
                keep(curves)
            if progress is not None:
                progress(done, total)
    return Faithfulness(task=task.name, percent=list(percent), curves={**curves})


def _ranking(
    choice: str, importance: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], seed: int
) -> dict[str, Tensor]:
    if choice == "importance":
        return {name: importance[name] for name in parameters}
    if choice == "magnitude":
        return {name: p.detach().abs() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) for name, p in parameters.items()}


@contextmanager
def _zeroed(
    parameters: Mapping[str, nn.Parameter], scores: Mapping[str, Tensor], share: float
) -> Iterator[None]:
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                count = round(share * p.numel())
                if count:
                    top = scores[name].reshape(-1).topk(count).indices.to(p.device)
                    p.view(-1)[top] = 0.0
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])
