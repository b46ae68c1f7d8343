"""Whether a hold is strong enough to be one: said when it is attached, with a strength that would be."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from holdfast.hold.attach import Chunk
from holdfast.hold.schedule import TOTAL
from holdfast.importance.prior import some

_FAINT_SHARE = 1e-3  # of each step, on average over all weights
_FAINT_PULL = 0.1  # of a weight of mean importance, over a task: its way is shortened by 5 %
_PULL = 5.0  # what is suggested, the anchor's default by inputs
_STEPS = 10_000  # that a task has at the most, where nobody has told


def mean_of(values: Iterable[Tensor]) -> float:
    """Mean over all elements of some tensors; what is negative counts as 0."""
    total, count = 0.0, 0
    for value in values:
        total += float(value.clamp(min=0).sum(dtype=torch.float64))
        count += value.numel()
    return total / max(count, 1)


def warn_if_share_is_faint(whose: str, share: float, importance: str) -> None:
    """Of a mechanism that holds a share of each step."""
    if share < _FAINT_SHARE:
        warnings.warn(
            f"{whose}: it holds {share:.1g} of each step, on average over the prior's weights, which "
            f"is almost nothing: the values of '{importance}' are far below 1. Take shape='soft' or 'top', "
            "which ask for their order alone, or scale them (prior.mean_normalised()).",
            stacklevel=2,
        )


def warn_if_pull_is_faint(
    whose: str, strength: float, mean: float, optimizer: Optimizer, chunks: Sequence[Chunk]
) -> None:
    """Of a mechanism that pulls a weight of importance I back by η · strength · I a step.

    Parameters
    ----------
    mean : float
        Of I, over the weights that are held.
    """
    if strength == 0:
        return
    if mean == 0:
        warnings.warn(
            f"{whose}: the prior's rows give none of the weights that it is to hold an importance above 0 "
            f"({some([name for chunk in chunks for name in chunk.names])}), so they change freely: none of "
            "the rows needs them (of embeddings of tokens: none has these tokens). If others do, compute the "
            "prior again on such rows.",
            stacklevel=2,
        )
        return
    rates = []
    for number in {chunk.group for chunk in chunks}:
        group = optimizer.param_groups[number]
        rates.append(group.get(TOTAL) or _STEPS * float(group.get("initial_lr", group["lr"]) or 0.0))
    whole = strength * mean * max(rates, default=0.0)
    if whole >= _FAINT_PULL or not any(rates):
        return
    wanted = f"{strength * _PULL / whole:.0e}".replace("e+0", "e").replace("e+", "e")
    warnings.warn(
        f"{whose}: with strength={strength:g}, a weight of mean importance ({mean:.2g}) is pulled back by "
        f"{100 * whole:.1g} % over the task, which is almost nothing. strength={wanted} is a whole pull of "
        f"{_PULL:g}, the anchor's default by inputs.",
        stacklevel=2,
    )
