"""Statistics of a comparison: spread over runs, paired differences, curves. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from holdfast.records import Curve, CurvePoint, Difference, Spread

METRICS = ("ap", "fwt", "bwt", "forgetting", "learning_accuracy")  # in percent, as in metrics.json
LEVEL = 0.95
RESAMPLES = 10_000

Key = TypeVar("Key", bound=Hashable)
Number = float | None


def mean_and_spread(values: Sequence[Number]) -> Spread:
    """Mean and sample standard deviation (n − 1) of what was measured."""
    known = [value for value in values if value is not None]
    return Spread(
        mean=statistics.fmean(known) if known else None,
        sd=statistics.stdev(known) if len(known) > 1 else None,
        n=len(known),
    )


def paired_differences(values: Mapping[Key, Number], reference: Mapping[Key, Number]) -> list[float]:
    """Value minus reference wherever both were measured under the same key, such as (seed, order).

    A pair shares its data, its order and its random numbers, so their differences vary less than the values.
    """
    differences = []
    for key, value in values.items():
        other = reference.get(key)
        if value is not None and other is not None:
            differences.append(value - other)
    return differences


def bootstrap_interval(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13).

    The same values give the same interval: the resamples are drawn by `seed`.

    Parameters
    ----------
    values : sequence of float
        One a pair. With few pairs the interval is too narrow: two can't show more than their own range.
    level : float
        Share of the resampled means between the two bounds.

    Returns
    -------
    (float, float) or None
        Lower and upper bound; None with fewer than two values.
    """
    if len(values) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(dim=1).sort().values
    tail = (1 - level) / 2
    low, high = math.floor(tail * resamples), math.ceil((1 - tail) * resamples) - 1
    return float(means[low]), float(means[high])


def difference(values: Mapping[Key, Number], reference: Mapping[Key, Number]) -> Difference:
    """Mean paired difference with its bootstrap interval."""
    pairs = paired_differences(values, reference)
    low, high = bootstrap_interval(pairs) or (None, None)
    return Difference(mean=statistics.fmean(pairs) if pairs else None, low=low, high=high, pairs=len(pairs))


def strength_key(grid: Mapping[str, Sequence[Any]]) -> str | None:
    """The key of a grid whose values are a strength: numbers, a key called so before any other.

    None where no key has two or more different numbers.
    """
    numeric = [
        key
        for key, values in grid.items()
        if len(set(map(str, values))) > 1
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    ]
    named = [key for key in numeric if "strength" in key.rsplit(".", 1)[-1]]
    return next(iter(named or numeric), None)


def curves(
    grid: Mapping[str, Sequence[Any]], points: Sequence[tuple[Mapping[str, Any], Mapping[str, Number]]]
) -> list[Curve]:
    """Learning accuracy and AP over a strength, a curve for each choice of the grid's other keys.

    Parameters
    ----------
    grid : mapping
        Key to values.
    points : sequence of (point, means)
        What each key is at the point, and the mean of each metric there. Points that lack AP or learning
        accuracy are left out.

    Returns
    -------
    list of Curve
        Nothing where the grid has no strength.
    """
    key = strength_key(grid)
    if key is None:
        return []
    found: dict[str, tuple[dict[str, Any], list[CurvePoint]]] = {}
    for point, means in points:
        fixed = {k: v for k, v in point.items() if k != key}
        _, measured = found.setdefault(str(fixed), (fixed, []))
        ap, learned = means.get("ap"), means.get("learning_accuracy")
        if ap is not None and learned is not None:
            measured.append(CurvePoint(value=point[key], learning_accuracy=learned, ap=ap))
    return [
        Curve(key=key, fixed=fixed, points=sorted(measured, key=lambda p: p.value))
        for fixed, measured in found.values()
        if measured
    ]
