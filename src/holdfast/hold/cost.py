"""What a method holds in memory beside model, gradients and optimizer, told before a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from holdfast.importance.moments import Rank, Sketch, columns, rows_of
from holdfast.importance.registry import REGISTRY
from holdfast.models import block_parameters, input_dims
from holdfast.names import is_lora


class Cost(NamedTuple):
    """A line of the estimate of ``holdfast check``.

    Attributes
    ----------
    what : str
    size : int
        Bytes, at the most that there is of it at one time.
    note : str
        A remark for the user, if there is one.
    """

    what: str
    size: int
    note: str = ""


class Estimate(NamedTuple):
    """What a strategy takes beside plain training.

    Attributes
    ----------
    costs : sequence of Cost
        What it holds in memory beside model, gradients and optimizer.
    trained : int, optional
        How many numbers its first stage trains, where these are not all that have ``requires_grad``.
    further : sequence of (int, float or None)
        Rows and epochs (none: the run's) of trainings that its `end` adds.
    """

    costs: Sequence[Cost] = ()
    trained: int | None = None
    further: Sequence[tuple[int, float | None]] = ()


def trained_numbers(model: nn.Module) -> int:
    """How many numbers have ``requires_grad``."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trained_bytes(model: nn.Module, each: int | None = None) -> int:
    """Bytes of one value for each trained weight: of its own dtype, or `each` bytes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(p.numel() * (each or p.element_size()) for p in trained)


LARGE = 2**30  # bytes of a prior; below, keeping all directions costs nobody anything


def prior_costs(
    model: nn.Module,
    options: Any,
    kept: int = 1,
    weights: Sequence[nn.Parameter] | None = None,
) -> list[Cost]:
    """Of computing priors and protecting weights by them.

    Parameters
    ----------
    options : options model
        Of an importance.
    kept : int
        How many priors act at the same time, each with a mechanism of its own.
    weights : sequence of Parameter, optional
        What is rated weight by weight, beside another prior; by default all that the importance can.
    """
    if REGISTRY[options.name].kind == "inputs":
        return _inputs_costs(model, kept, options.rank)
    beside = weights is not None
    if weights is None:
        weights = list(REGISTRY[options.name].rated(model).values())
    if not weights:
        return []
    elements, largest = sum(p.numel() for p in weights), max(p.numel() for p in weights)
    unrated = 0 if beside else trained_bytes(model, each=1) - elements
    several = "" if kept == 1 else f", {kept} of them"
    several += " of what is no linear map" if beside else ""
    costs = [
        Cost(
            f"prior (float32, on the CPU){several}",
            kept * elements * 4,
            f"{unrated:,} trained parameters (embeddings, norms, head) are not rated and not "
            "held; model.trainable: blocks trains only what is, an importance such as fisher rates all."
            if unrated
            else "",
        ),
        Cost(
            f"protection (reference or snapshot, and its factors){several}",
            kept * 2 * sum(p.numel() * p.element_size() for p in weights),
        ),
    ]
    if REGISTRY[options.name].needs_data:
        folded = getattr(options, "folded", 1)
        fold = folded * elements * 4
        budget = getattr(options, "memory_budget", None)
        if budget:  # of what is not folded yet; then one number each
            fold = min(fold, budget + elements * 4)
        costs.append(
            Cost("per-sample maps (one layer at a time) and fold", options.batch_size * largest * 4 + fold)
        )
    return costs


def advised_rank(model: nn.Module) -> int | None:
    """Directions to keep of each map, where whole matrices take more than the model (without LoRA: its maps).

    Returns
    -------
    int or None
        A quarter of the narrowest map's inputs; None where whole ones fit, or take less than `LARGE` bytes.
    """
    dims, weights = input_dims(model), block_parameters(model)
    maps = {name: p for name, p in weights.items() if name in dims}
    taken = sum(4 * p.shape[dims[name]] ** 2 for name, p in maps.items())
    against = model.parameters() if _adapted(weights) else maps.values()
    if taken <= max(4 * sum(p.numel() for p in against), LARGE):
        return None
    whole = [p.shape[dims[name]] for name, p in maps.items() if ".lora_B" not in name]
    return max(min(whole) // 4, 1)  # a LoRA's B has its rank's few inputs


def _adapted(weights: Iterable[str]) -> bool:
    return any(is_lora(name) for name in weights)


def _inputs_costs(model: nn.Module, kept: int, rank: Rank | None) -> list[Cost]:
    """How few directions ``auto`` needs is not known before: it counts as all."""
    dims, weights = input_dims(model), block_parameters(model)
    maps = [(p.shape[dims[name]], p) for name, p in weights.items() if name in dims]
    widths = [(inputs, columns(inputs, rank)) for inputs, _ in maps]
    sizes = [4 * inputs * rows_of(inputs, rank) for inputs, _ in maps]
    elements = sum(p.numel() for _, p in maps)
    note, quarter = "", advised_rank(model) if rank is None else None
    if quarter is not None:
        note = (
            f"the prior is larger than the {'model' if _adapted(weights) else 'weights that it holds'}; "
            f"strategy.importance.rank={quarter} keeps a quarter of the narrowest map's directions, and the "
            "mean of the others."
        )
    costs = [
        Cost("prior (a matrix a linear map, float32, on the CPU)", kept * sum(sizes), note),
        Cost(
            "its eigenvectors (float64 on the CPU, float32 beside the weights)",
            kept * sum(_basis_bytes(inputs, k) for inputs, k in widths),
        ),
        Cost("hold (reference, and the change in rotated coordinates)", kept * 4 * 3 * elements),
    ]
    if isinstance(rank, int):
        sketch = Sketch(rank)
        made = sum(4 * i * (sketch.rows if sketch.takes(i) else i) for i, k in widths if k < i)
        costs.insert(1, Cost("sketches that it is made of, and whole sums of narrow maps", made))
    return costs


def _basis_bytes(inputs: int, kept: int) -> int:
    """K directions in float64, and what multiplies by them in float32: the matrix, or two of K columns."""
    return inputs * kept * (8 + 4 if kept == inputs else 8 + 2 * 4)
