"""Bases of a map's inputs: products with an orthonormal U, stored whole or as what turns its first axes."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Basis(Protocol):
    """An orthonormal U (I, I), directions in columns, on a device and in at least float32."""

    dtype: torch.dtype

    def into(self, matrix_OI: Tensor, out: Tensor | None = None) -> Tensor:
        """M U. `out` may not be M."""
        ...

    def back(self, matrix_OI: Tensor, add_OI: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """M Uᵀ, on top of `add_OI` if there is any. `out` may be neither."""
        ...


class Whole:
    """U as it is: 2 I² operations a row of M, I² values."""

    def __init__(self, basis_II: Tensor) -> None:
        self.basis_II, self.dtype = basis_II, basis_II.dtype

    def into(self, matrix_OI: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Basis.into`."""
        return torch.mm(matrix_OI, self.basis_II, out=out)

    def back(self, matrix_OI: Tensor, add_OI: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """See `Basis.back`."""
        if add_OI is None:
            return torch.mm(matrix_OI, self.basis_II.t(), out=out)
        return torch.addmm(add_OI, matrix_OI, self.basis_II.t(), out=out)


class Leading:
    """U whose first K columns are given directions, up to sign; the others are what it makes of the axes.

    U = 1 − A Yᵀ is a product of K reflections (Householder; Y and A = Y T are (I, K)), so a product with it
    is two with K columns: 4 I K operations a row of M, 2 I K values.

    Parameters
    ----------
    leading_IK : Tensor
        Orthonormal columns.
    """

    def __init__(self, leading_IK: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        reflected_IK, tau_K = torch.geqrf(leading_IK)
        turn_IK = reflected_IK.tril(-1)
        turn_IK.diagonal().fill_(1)
        inverse_KK = (turn_IK.t() @ turn_IK).triu(1)
        inverse_KK.diagonal().copy_(1 / tau_K)
        # A = Y T, and T's inverse is triangular
        drawn_IK = torch.linalg.solve_triangular(inverse_KK, turn_IK, upper=True, left=False)
        self.turn_IK, self.drawn_IK = (t.to(device, dtype, copy=True) for t in (turn_IK, drawn_IK))
        self.dtype = dtype

    def into(self, matrix_OI: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Basis.into`."""
        return torch.addmm(matrix_OI, matrix_OI @ self.drawn_IK, self.turn_IK.t(), alpha=-1, out=out)

    def back(self, matrix_OI: Tensor, add_OI: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """See `Basis.back`."""
        turned_OK = matrix_OI @ self.turn_IK
        if add_OI is not None:
            out = matrix_OI = torch.add(add_OI, matrix_OI, out=out)
        return torch.addmm(matrix_OI, turned_OK, self.drawn_IK.t(), alpha=-1, out=out)


def basis_of(directions_IK: Tensor, **kind: Any) -> Basis:
    """The basis with these orthonormal columns first; all I of them are the basis itself.

    Parameters
    ----------
    **kind
        `device` and `dtype` of the products.
    """
    if directions_IK.shape[0] == directions_IK.shape[1]:
        return Whole(directions_IK.to(**kind, copy=True))
    return Leading(directions_IK, kind["dtype"], kind["device"])
