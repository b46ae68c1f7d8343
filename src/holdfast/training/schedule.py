"""The learning rate over a whole training, told before it begins."""

from __future__ import annotations

from typing import Any


def total_rate(scheduler: Any, steps: int) -> float | None:
    """The sum of the learning rate over so many steps, of the parameter group where it is largest.

    Parameters
    ----------
    scheduler : LRScheduler, optional
        A scheduler whose rate is a function of the step (``lr_lambdas``: all of transformers' but those that
        look at the loss), or accelerate's wrapper around one.
    steps : int

    Returns
    -------
    float or None
        None where the scheduler doesn't tell, or the number of steps is unknown.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    factors = getattr(inner, "lr_lambdas", None)
    if factors is None or steps <= 0:
        return None
    sums = [
        base * sum(factor(step) for step in range(steps))
        for base, factor in zip(inner.base_lrs, factors, strict=True)
    ]
    return float(max(sums))
