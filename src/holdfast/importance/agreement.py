"""Do two tasks need the same weights? Top-K overlap and rank correlation of their priors (A, figure 1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.errors import PriorMismatchError
from holdfast.importance.prior import ImportancePrior
from holdfast.names import Block, block_of, order_of

TOP = 0.1  # A speaks of the "top-K" elements of each tensor without giving K: here a tenth of them


@dataclass(frozen=True)
class Agreement:
    """How alike two priors are in one transformer block.

    Attributes
    ----------
    overlap : float
        |P ∩ Q| / K for the sets P, Q of the K most important elements of a tensor, in [0, 1]. Priors that
        have nothing to do with each other get K / N, the share of the elements that is looked at.
    spearman : float
        Correlation of the ranks of all elements, in [-1, 1]; 0 by chance.

    Both are computed tensor by tensor, as A does, and averaged over the block's tensors by their number of
    elements. NaN: a constant prior ranks nothing.
    """

    overlap: float
    spearman: float


def agreement(
    first: ImportancePrior,
    second: ImportancePrior,
    *,
    top: float = TOP,
    sample: int | None = None,
    seed: int = 0,
) -> dict[Block, Agreement]:
    """Compare what two tasks find important, block by block.

    The priors' values are ranked as they are: a negative relevance is less important than none. Memory
    beside the priors is about 70 bytes an element of the largest tensor, or of `sample`.

    Parameters
    ----------
    first, second : ImportancePrior
        Of the same weights.
    top : float
        Share of each tensor's elements that count as important, 0 < top < 1.
    sample : int, optional
        Of larger tensors only this many elements are compared; all by default.
    seed : int
        Chooses them: the same ones in both priors.

    Returns
    -------
    dict of Block to Agreement
        From the input up, an encoder before a decoder. Weights outside the blocks are left out.

    Raises
    ------
    PriorMismatchError
        The priors cover different weights, or one of them rates directions of inputs.
    """
    if {first.kind, second.kind} != {"weights"}:
        raise PriorMismatchError(
            "agreement of two priors: it is about which weights are important, and a prior of the kind "
            "'inputs' rates directions. Compare priors by weight."
        )
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        shapes = [tuple(p.tensors[name].shape) if name in p.tensors else None for p in (first, second)]
        if shapes[0] != shapes[1]:
            had = " and ".join("nothing" if s is None else f"shape {s}" for s in shapes)
            raise PriorMismatchError(
                f"agreement of two priors: for '{name}' they have {had}. Compare priors that were computed "
                "on the same architecture with the same trainable weights."
            )
    pairs = ((name, (tensor, second.tensors[name])) for name, tensor in first.tensors.items())
    found = pairwise_by_block(pairs, top=top, sample=sample, seed=seed)
    return {block: Agreement(o_TT[0, 1].item(), r_TT[0, 1].item()) for block, (o_TT, r_TT) in found.items()}


def pairwise_by_block(
    tensors: Iterable[tuple[str, Sequence[Tensor]]],
    *,
    top: float = TOP,
    sample: int | None = None,
    seed: int = 0,
) -> dict[Block, tuple[Tensor, Tensor]]:
    """Compare T priors with one another, given tensor by tensor; each tensor is sorted once a prior.

    Parameters
    ----------
    tensors : iterable of (str, sequence of Tensor)
        Canonical parameter name and the T priors' values for it, all of one shape.
    top, sample, seed
        As in `agreement`.

    Returns
    -------
    dict of Block to (Tensor, Tensor)
        The overlap and Spearman's correlation, (T, T) and symmetric, float64; blocks in order.
    """
    sums: dict[Block, list[Tensor]] = {}
    counts: dict[Block, list[Tensor]] = defaultdict(list)
    for name, values in tensors:
        block = block_of(name)
        if block is None or not values[0].numel():
            continue
        chosen = sampled(values[0].numel(), sample, seed)
        flat = [value.detach().reshape(-1) for value in values]
        found = compare([value if chosen is None else value[chosen] for value in flat], top)
        size = flat[0].numel()
        for i, table_TT in enumerate(found):
            if block not in sums or len(counts[block]) <= i:
                sums.setdefault(block, []).append(torch.zeros_like(table_TT))
                counts[block].append(torch.zeros_like(table_TT))
            sums[block][i] += size * table_TT.nan_to_num()
            counts[block][i] += size * ~table_TT.isnan()
    return {
        block: (sums[block][0] / counts[block][0], sums[block][1] / counts[block][1])
        for block in sorted(sums, key=order_of)
    }


def compare(values: Sequence[Tensor], top: float = TOP) -> tuple[Tensor, Tensor]:
    """Top-K overlap and Spearman's correlation of T vectors with one another.

    Parameters
    ----------
    values : sequence of Tensor
        T vectors of N elements.
    top : float
        K is this share of N, at least 1.

    Returns
    -------
    overlap_TT, spearman_TT : Tensor
        float64. NaN in the rows and columns of a constant vector.
    """
    if not 0 < top < 1:
        raise ValueError(f"top: a share of the elements between 0 and 1, got {top}")
    ranks_TN = torch.stack([ranks(value) for value in values])
    shares_TN = torch.stack([top_shares(value, top) for value in values])
    constant_T = (ranks_TN == ranks_TN[:, :1]).all(dim=1)
    ranks_TN -= ranks_TN.mean(dim=1, keepdim=True)
    tables = []
    for rows_TN, least in ((shares_TN, 0.0), (ranks_TN, -1.0)):
        rows_TN /= torch.linalg.vector_norm(rows_TN, dim=1, keepdim=True)
        table_TT = (rows_TN @ rows_TN.T).clamp(least, 1.0)
        table_TT[constant_T] = math.nan
        table_TT[:, constant_T] = math.nan
        tables.append(table_TT)
    return tables[0], tables[1]


def ranks(values_N: Tensor) -> Tensor:
    """The ranks of a vector's elements from 1 (the smallest), float64; equal ones share their mean rank."""
    sorted_N, order_N = torch.sort(values_N)
    ranks_N = torch.arange(1, len(values_N) + 1, dtype=torch.float64)
    if (sorted_N[1:] == sorted_N[:-1]).any():
        _, sizes = torch.unique_consecutive(sorted_N, return_counts=True)
        last = sizes.cumsum(0)
        ranks_N = ((2 * last - sizes + 1).double() / 2).repeat_interleave(sizes)
    return torch.empty_like(ranks_N).scatter_(0, order_N, ranks_N)


def top_shares(values_N: Tensor, top: float) -> Tensor:
    """How far each element belongs to the K largest: 1, 0, or an equal share where several tie for a place.

    The overlap of two such vectors p and q is p·q / (‖p‖ ‖q‖). Without ties this is |P ∩ Q| / K; with ties it
    depends neither on the order of the elements nor on which of them a sort happens to take.
    """
    size = len(values_N)
    count = max(1, round(top * size))
    border = torch.kthvalue(values_N, size - count + 1).values
    above_N, tied_N = values_N > border, values_N == border
    return above_N.double() + tied_N.double() * ((count - above_N.sum()) / tied_N.sum())


def sampled(size: int, most: int | None, seed: int) -> Tensor | None:
    """Indices of about `most` elements, one from each of as many equal stretches; None means all."""
    if most is None or size <= most:
        return None
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(most, dtype=torch.float64) + torch.rand(
        most, dtype=torch.float64, generator=generator
    )
    return torch.unique_consecutive((starts * (size / most)).long().clamp(max=size - 1))
