"""Second moments of a map's inputs, whole or as leading directions over the mean of the rest.

A moment C is one tensor, float32, of either form:

* whole: C itself, (I, I);
* leading, (K + 1, I) with 2 K < I: C = Σ_k f_k f_kᵀ + diag(d²). f_k are the first K rows, orthogonal, the
  longest first; d is the last one, √m everywhere. The K largest eigenvalues are |f_k|² + m, all others m, and
  the squares of all numbers sum to the trace.

The second form takes (K + 1) / I of the first one's bytes, adds up without ever being made whole, and comes
out of a `Sketch` that never was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from holdfast.importance.seeding import seed_for

Rank = int | Literal["auto"]
_KEPT = 0.99  # of a trace, by `auto`
_WIDTH = 4  # columns of a sketch for each direction that is wanted


def columns(inputs: int, rank: Rank | None) -> int:
    """How many directions of a map are told apart: K, or all where K is half of them or more.

    Of ``auto`` it is not known before: at most all.
    """
    return inputs if not isinstance(rank, int) or 2 * rank >= inputs else rank


def rows_of(inputs: int, rank: Rank | None) -> int:
    """How many rows of I numbers a moment is: I, or K + 1."""
    kept = columns(inputs, rank)
    return inputs if kept == inputs else kept + 1


def is_whole(c: Tensor) -> bool:
    """Whether it is (I, I)."""
    return c.shape[0] == c.shape[1]


def shape_of(c: Tensor) -> torch.Size:
    """(I, I) of a moment in either form; of anything else the tensor's own shape."""
    if c.ndim == 2 and c.shape[0] > 0 and 2 * (c.shape[0] - 1) < c.shape[1]:
        return torch.Size([c.shape[1]] * 2)
    return c.shape


def whole(c: Tensor) -> Tensor:
    """C, (I, I)."""
    return c if is_whole(c) else c[:-1].t() @ c[:-1] + torch.diag(c[-1].square())


def diagonal(c: Tensor) -> Tensor:
    """The diagonal of C, (I,)."""
    return c.diagonal() if is_whole(c) else c.square().sum(0)


def trace(c: Tensor) -> float:
    """The sum of all eigenvalues."""
    return diagonal(c).sum(dtype=torch.float64).item()


def scaled(c: Tensor, factor: float) -> Tensor:
    """factor · C, factor ≥ 0."""
    return (c.double() * (factor if is_whole(c) else factor**0.5)).float()


def mean_eigenvalue_one(c: Tensor) -> Tensor:
    """C scaled to mean eigenvalue 1; of zeros it comes back as it is."""
    size = trace(c)
    return scaled(c, c.shape[1] / size) if size > 0 else c


def energy(weight_OI: Tensor, c: Tensor) -> float:
    """tr(W C Wᵀ), in the weight's type."""
    c = c.to(weight_OI)
    if is_whole(c):
        return float(((weight_OI @ c) * weight_OI).sum())
    return float((weight_OI @ c[:-1].t()).square().sum() + (weight_OI * c[-1]).square().sum())


def summed(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ_i share_i C_i. Where one is whole it is whole; else it has as many directions as the widest.

    Of leading ones the sum is exact up to the last cut: what the new K directions leave joins the mean.
    """
    if any(is_whole(c) for c in parts):
        total_II = whole(parts[0]) * shares[0]
        for c, share in zip(parts[1:], shares[1:], strict=True):
            total_II.add_(whole(c), alpha=share)
        return total_II
    pairs = [(c.double(), share) for c, share in zip(parts, shares, strict=True)]
    rows_NI = torch.cat([c[:-1] * share**0.5 for c, share in pairs])
    rest = sum(float(c[-1, 0]) ** 2 * share for c, share in pairs)
    return _of_rows(rows_NI, rest, max(len(c) for c in parts) - 1)


def cut(c: Tensor, rank: Rank) -> Tensor:
    """Its K leading directions and the mean of the rest; as it is where that is no less.

    Parameters
    ----------
    rank : int or "auto"
        K. ``auto``: as few as have 99 % of the trace.
    """
    inputs = c.shape[1]
    if not is_whole(c):
        kept = _enough(_values(c).flip(0)) if rank == "auto" else rank
        return c if kept >= len(c) - 1 else _of_rows(c[:-1].double(), float(c[-1, 0]) ** 2, kept)
    if rank != "auto" and columns(inputs, rank) == inputs:
        return c
    c_I, basis_II = eigenvectors(c)
    c_I = c_I.clamp(min=0)
    if rank == "auto":
        rank = _enough(c_I)
        if columns(inputs, rank) == inputs:
            return c
    return _leading(c_I.flip(0)[:rank], basis_II.flip(1)[:, :rank], float(c_I.sum()))


def _enough(c_I: Tensor) -> int:
    """How many of the largest eigenvalues have the share of the trace that `auto` keeps; they ascend."""
    beyond_I = c_I.cumsum(0)  # of the smallest 1, 2, ...
    return max(1, len(c_I) - int((beyond_I <= (1 - _KEPT) * beyond_I[-1]).sum()))


def _values(c: Tensor) -> Tensor:
    """Eigenvalues (I,) of a leading moment, float64: the K largest, descending, then the others' mean."""
    sizes_K, rest = c[:-1].double().square().sum(1), float(c[-1, 0].double() ** 2)
    values_I = torch.full((c.shape[1],), rest, dtype=torch.float64, device=c.device)
    values_I[: len(sizes_K)] += sizes_K
    return values_I


def spectrum(c: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, float64.

    Returns
    -------
    Tensor (I,), Tensor (I, K)
        Whole: ascending, and all in columns. Leading: the K largest, descending, and then the mean of the
        others.
    """
    if is_whole(c):
        return eigenvectors(c)
    sizes_K = c[:-1].double().square().sum(1)
    found = max(int((sizes_K > 0).sum()), 1)
    rows_KI = c[:found].double() if sizes_K[0] > 0 else torch.eye(1, c.shape[1]).to(c).double()
    # rounded to float32 the rows are orthogonal to 1e-7
    directions_IK, turned_KK = torch.linalg.qr(rows_KI.t())
    return _values(c), directions_IK * turned_KK.diagonal().sign()


def eigenvectors(c_II: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (I,), ascending, and U (I, I) of a symmetric matrix, in float64, on the matrix's device.

    They are made on the GPU where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else c_II.device
    # a copy: the last bits of a decomposition may depend on how a file's memory is aligned
    values_I, basis_II = torch.linalg.eigh(c_II.to(device, torch.float64, copy=True))
    return values_I.to(c_II.device), basis_II.to(c_II.device)


def told_apart(c: Tensor) -> int:
    """How many of its directions are: I, or K."""
    return len(c) if is_whole(c) else len(c) - 1


def turned(c: Tensor, basis_IK: Tensor) -> Tensor:
    """The same eigenvalues on other orthonormal directions, as many as are told apart."""
    if not is_whole(c):
        lengths_K1 = torch.linalg.vector_norm(c[:-1].double(), dim=1, keepdim=True)
        return torch.cat([(lengths_K1 * basis_IK.t()).float(), c[-1:]])
    c_I = torch.linalg.eigvalsh(c.double())
    turned_II = (basis_IK * c_I) @ basis_IK.t()
    return ((turned_II + turned_II.t()) / 2).float()


def alike(c: Tensor) -> Tensor:
    """Mean eigenvalue 1 in all directions, in the same form; of zeros zeros."""
    if is_whole(c):
        return torch.eye(len(c)) * float(c.any())
    rows = torch.zeros_like(c)
    rows[-1] = float(c.any())
    return rows


class Sketch:
    """C Ω of moments that are too wide to be summed whole, Ω (I, L) normal, L = 4 K (Nyström).

    A sum over tokens as C is: whatever their order, and however they are shared. Its last row is C's
    diagonal. In place of I² values a map there are (L + 1) I, in place of 2 I² operations a token 4 L I.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.rows = rank, _WIDTH * rank + 1
        self._drawn: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def takes(self, inputs: int) -> bool:
        """Whether a map is so wide that its sketch is smaller than its moment."""
        return self.rows < inputs

    def add(self, total_LI: Tensor, y_NI: Tensor) -> None:
        """Add the tokens of Σ_n y_n y_nᵀ to a sketch, (L + 1, I)."""
        omega_IL = self._omega(y_NI.shape[1], y_NI.device, y_NI.dtype)
        total_LI[:-1].addmm_((y_NI @ omega_IL).t(), y_NI)
        total_LI[-1] += y_NI.square().sum(0)

    def result(self, total_LI: Tensor) -> Tensor:
        """The moment, leading: Nyström's approximation from C Ω, which loses hardly more than the best.

        As Tropp, Yurtsever, Udell and Cevher (2017, algorithm 3), Ω's Gram matrix by eigenvalues in place
        of a Cholesky factor: sums of float32 are not symmetric to float64's rounding.
        """
        inputs, size = total_LI.shape[1], float(total_LI[-1].sum(dtype=torch.float64))
        if size <= 0:
            return torch.zeros(self.rank + 1, inputs)
        omega_IL = self._omega(inputs, total_LI.device, total_LI.dtype).double()
        sketch_IL = total_LI[:-1].double().t()
        shift = torch.finfo(total_LI.dtype).eps * float(torch.linalg.matrix_norm(sketch_IL))
        sketch_IL = sketch_IL + shift * omega_IL
        core_LL = omega_IL.t() @ sketch_IL
        b_L, v_LL = torch.linalg.eigh((core_LL + core_LL.t()) / 2)
        above = b_L > torch.finfo(total_LI.dtype).eps * b_L[-1]
        factor_IL = sketch_IL @ (v_LL[:, above] / b_L[above].sqrt())
        u_IL, s_L, _ = torch.linalg.svd(factor_IL, full_matrices=False)
        c_L = (s_L.square() - shift).clamp(min=0)[: self.rank]
        c_L *= size / max(float(c_L.sum()), size)
        return _leading(c_L, u_IL[:, : self.rank], size, self.rank).cpu()

    def _omega(self, inputs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The same for all maps of a width: drawn by it on the CPU, so that it is the same anywhere."""
        key = (inputs, device, dtype)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(seed_for(f"sketch of {inputs}", self.rank))
            drawn_IL = torch.randn(inputs, self.rows - 1, generator=generator)
            self._drawn[key] = drawn_IL.to(device, dtype)
        return self._drawn[key]


def _leading(c_K: Tensor, basis_IK: Tensor, size: float, rank: int | None = None) -> Tensor:
    """From the largest eigenvalues, their directions and the trace; zeros where there are fewer than K."""
    inputs, found = len(basis_IK), len(c_K)
    rest = max(size - float(c_K.sum()), 0.0) / (inputs - found)
    rows_KI = torch.zeros((found if rank is None else rank) + 1, inputs, dtype=torch.float64)
    rows_KI[:found] = ((c_K - rest).clamp(min=0).sqrt() * basis_IK).t()
    rows_KI[-1] = rest**0.5
    return rows_KI.float()


def _of_rows(rows_NI: Tensor, rest: float, rank: int) -> Tensor:
    """Of Σ_n r_n r_nᵀ + rest · 1."""
    inputs = rows_NI.shape[1]
    size = float(rows_NI.square().sum()) + rest * inputs
    b_N, v_NN = torch.linalg.eigh(rows_NI @ rows_NI.t())
    b_N, v_NN = b_N.flip(0)[:rank].clamp(min=0), v_NN.flip(1)[:, :rank]
    lengths_N = b_N.sqrt()
    there = lengths_N > 1e-7 * lengths_N[0]  # more than rounding of float32
    basis_IK = rows_NI.t() @ (v_NN[:, there] / lengths_N[there])
    return _leading(b_N[there] + rest, basis_IK, size, rank)
