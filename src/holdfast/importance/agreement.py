"""Do two tasks need the same weights, or inputs? Overlap and correlation of their priors (A, figure 1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.importance.moments import whole
from holdfast.importance.prior import ImportancePrior, Kind, require_alike
from holdfast.names import Block, block_of, order_of

TOP = 0.1  # A speaks of the "top-K" elements of each tensor without giving K: here a tenth of them
WIDTH = 1024  # of wider maps as many inputs are compared where `sample` is given: an eigenbasis costs O(I³)


@dataclass(frozen=True)
class Agreement:
    """How alike two priors are in one transformer block.

    Attributes
    ----------
    overlap : float
        By weight |P ∩ Q| / K for the sets P, Q of the K most important elements of a tensor, in [0, 1]. By
        inputs ‖PᵀQ‖² / K for bases P, Q of the K leading directions of a map's inputs, the same where
        both are coordinate axes. Priors that have nothing to do with each other get K / N, the share that is
        looked at.
    correlation : float
        In [-1, 1]; 0 by chance. By weight Spearman's, of the ranks of all elements. By inputs that of the two
        second moments: the cosine of C − mean(c) · 1.

    Both are computed tensor by tensor, as A does, and averaged over the block's tensors by their number of
    elements. NaN: a prior that is the same everywhere ranks nothing.
    """

    overlap: float
    correlation: float


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
        Of larger tensors only this many elements are compared, and of wider maps `WIDTH` inputs; all by
        default.
    seed : int
        Chooses them: the same ones in both priors.

    Returns
    -------
    dict of Block to Agreement
        From the input up, an encoder before a decoder. Weights outside the blocks are left out.

    Raises
    ------
    PriorMismatchError
        The priors cover different weights, or are of different kinds.
    ConfigError
        `top` is no such share.
    """
    require_alike([first, second], "comparison")
    pairs = ((name, (tensor, second.tensors[name])) for name, tensor in first.tensors.items())
    found = pairwise_by_block(pairs, first.kind, top=top, sample=sample, seed=seed)
    return {block: Agreement(o_TT[0, 1].item(), r_TT[0, 1].item()) for block, (o_TT, r_TT) in found.items()}


def pairwise_by_block(
    tensors: Iterable[tuple[str, Sequence[Tensor]]],
    kind: Kind = "weights",
    *,
    top: float = TOP,
    sample: int | None = None,
    seed: int = 0,
) -> dict[Block, tuple[Tensor, Tensor]]:
    """Compare T priors of one kind with one another, given tensor by tensor.

    Parameters
    ----------
    tensors : iterable of (str, sequence of Tensor)
        Canonical parameter name and the T priors' values for it, all of one shape.
    top, sample, seed
        As in `agreement`.

    Returns
    -------
    dict of Block to (Tensor, Tensor)
        The overlap and the correlation, (T, T) and symmetric, float64; blocks in order.
    """
    sums: dict[Block, list[Tensor]] = {}
    counts: dict[Block, list[Tensor]] = defaultdict(list)
    for name, values in tensors:
        block = block_of(name)
        if block is None or not values[0].numel():
            continue
        size = values[0].numel()
        if kind == "inputs":
            moments = [whole(value.detach()) for value in values]
            size = moments[0].numel()
            chosen = sampled(len(moments[0]), None if sample is None else WIDTH, seed)
            found = compare_moments([c if chosen is None else c[chosen][:, chosen] for c in moments], top)
        else:
            chosen = sampled(size, sample, seed)
            flat = [value.detach().reshape(-1) for value in values]
            found = compare([value if chosen is None else value[chosen] for value in flat], top)
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
    overlap_TT, correlation_TT : Tensor
        float64. NaN in the rows and columns of a constant vector.
    """
    _require_share(top)
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


def compare_moments(values: Sequence[Tensor], top: float = TOP) -> tuple[Tensor, Tensor]:
    """Overlap of the leading directions, and the correlation, of T second moments with one another.

    Parameters
    ----------
    values : sequence of Tensor
        T symmetric matrices (I, I).
    top : float
        K is this share of I, at least 1.

    Returns
    -------
    overlap_TT, correlation_TT : Tensor
        float64. NaN in the rows and columns of a multiple of the identity, which has no leading direction.
    """
    _require_share(top)
    c_TII = torch.stack([value.double() for value in values])
    count, size = max(1, round(top * c_TII.shape[-1])), c_TII.shape[-1]
    mean_T = c_TII.diagonal(dim1=-2, dim2=-1).mean(-1)
    apart_TII = c_TII - mean_T[:, None, None] * torch.eye(size, dtype=torch.float64)
    flat_T = (apart_TII.abs().amax((-2, -1)) <= 1e-12 * mean_T.abs()) | (c_TII == 0).all(-1).all(-1)
    leading_TIK = torch.linalg.eigh(c_TII).eigenvectors[..., -count:]
    between_TTKK = torch.einsum("aik,bil->abkl", leading_TIK, leading_TIK)
    overlap_TT = (between_TTKK.square().sum((-2, -1)) / count).clamp(0.0, 1.0)
    rows_TN = apart_TII.flatten(1)
    rows_TN = rows_TN / torch.linalg.vector_norm(rows_TN, dim=1, keepdim=True)
    tables = overlap_TT, (rows_TN @ rows_TN.T).clamp(-1.0, 1.0)
    for table_TT in tables:
        table_TT[flat_T] = math.nan
        table_TT[:, flat_T] = math.nan
    return tables


def _require_share(top: float) -> None:
    if not 0 < top < 1:
        raise ConfigError(f"top: got {top}. Give the share that counts as important, between 0 and 1.")


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
