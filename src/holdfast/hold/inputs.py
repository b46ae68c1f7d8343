"""Inputs: H Δ = Δ U diag(h) Uᵀ, held directions of what goes into a linear map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.hold.operator import Rate


class Inputs:
    """A share for each direction of a map's inputs, whatever its outputs.

    With C = U diag(c) Uᵀ the second moment of the old inputs that matter, tr(Δ C Δᵀ) is how far old outputs
    move under a change Δ of the map. Holding Δ along U by shares that grow with c leaves free what old
    inputs don't use.

    Parameters
    ----------
    shares : list of Tensor (I,)
        h of each map's directions. Only with a rate may they exceed 1.
    bases : list of Tensor (I, I)
        U, directions in columns, in at least float32; all products are made in that type.
    dims : list of int
        Which dimension of the weight is the input: 1 in `torch.nn.Linear`, 0 in transformers' Conv1D.

    Notes
    -----
    Where all directions of a map are held fully, `blend_` gives `towards` bit for bit. A single held
    direction u keeps the output of a map up to rounding: what W u differs by comes from rounding the new
    weights (half a unit in the last place of each) and from U's orthogonality (Δ's size times 1e-6 in
    float32). Where u is a coordinate axis it is exact.
    """

    def __init__(self, shares: list[Tensor], bases: list[Tensor], dims: list[int]) -> None:
        self.shares, self.bases, self.dims = shares, bases, dims

    def passed(self, rate: Rate | None) -> list[Tensor]:
        """1 − min(1, rate · h), or 1 − h, of each map's directions."""
        return [1 - (h if rate is None else (h * rate).clamp_(max=1.0)) for h in self.shares]

    def blend_(self, values: Sequence[Tensor], towards: Sequence[Tensor], rate: Rate | None = None) -> None:
        """See `Operator.blend_`."""
        rows = zip(values, towards, self.passed(rate), self.bases, self.dims, strict=True)
        for value, target, passed_I, basis_II, dim in rows:
            target_OI = outputs_first(target, dim).to(basis_II.dtype)
            change_OI = outputs_first(value, dim).to(basis_II.dtype) - target_OI
            outputs_first(value, dim).copy_(target_OI + _along(change_OI, basis_II, passed_I))

    def reduce_(self, changes: Sequence[Tensor | None]) -> None:
        """See `Operator.reduce_`."""
        self._scale(changes, self.passed(None))

    def times_(self, changes: Sequence[Tensor]) -> None:
        """See `Operator.times_`."""
        self._scale(changes, self.shares)

    def energy(self, changes: Sequence[Tensor]) -> Tensor:
        """See `Operator.energy`."""
        rows = zip(changes, self.shares, self.bases, self.dims, strict=True)
        parts = [((outputs_first(c, dim).to(u.dtype) @ u) ** 2 * h).sum() for c, h, u, dim in rows]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _scale(self, changes: Sequence[Tensor | None], factors: list[Tensor]) -> None:
        for change, factor_I, basis_II, dim in zip(changes, factors, self.bases, self.dims, strict=True):
            if change is not None:
                change_OI = outputs_first(change, dim)
                change_OI.copy_(_along(change_OI.to(basis_II.dtype), basis_II, factor_I))


def outputs_first(weight: Tensor, dim: int) -> Tensor:
    """A map's weight as a view (O, I), whose input dimension is `dim`."""
    return weight if dim == 1 else weight.t()


def _along(change_OI: Tensor, basis_II: Tensor, factor_I: Tensor) -> Tensor:
    """Δ U diag(factor) Uᵀ."""
    return (change_OI @ basis_II).mul_(factor_I) @ basis_II.t()


class Coordinates:
    """Lets an optimizer step in the basis in which an `Inputs` hold is diagonal.

    Adam divides by each weight's own history, so what a hold takes away along a direction of inputs, Adam on
    the weights gives back along mixtures of directions. Between `enter` and `leave` each parameter holds
    W U, and its gradient is G U: moments, weight decay, and whatever looks at a weight's norm (which the
    rotation keeps) act there. The step's change, W* and the change before it then give the new
    Z = (W − W*) U; its columns are pulled, and W = W* + Z Uᵀ.

    Parameters
    ----------
    parameters, references : list of Tensor
        W and W* of each map. W* must not change meanwhile.
    operator : Inputs

    Notes
    -----
    Z is made anew from W and W* at each step, so it is part of no checkpoint, and a killed training that
    goes on is the same bit for bit. After the step ``.grad`` is that in the rotated coordinates. Four
    products of I by I with O by I a map and step; memory: W* U, and Z during the step, in float32.
    """

    def __init__(self, parameters: list[Tensor], references: list[Tensor], operator: Inputs) -> None:
        self.operator = operator
        rows = zip(parameters, references, operator.bases, operator.dims, strict=True)
        self._maps = [(p, outputs_first(ref, dim), u, dim) for p, ref, u, dim in rows]
        self._origins = [ref_OI.to(u.dtype) @ u for _, ref_OI, u, _ in self._maps]
        self._changes: list[Tensor] = []

    def enter(self) -> None:
        """Before the step: W becomes W U, and its gradient G U."""
        self._changes = []
        for (parameter, ref_OI, basis_II, dim), origin_OI in zip(self._maps, self._origins, strict=True):
            weight_OI = outputs_first(parameter, dim)
            change_OI = (weight_OI.to(basis_II.dtype) - ref_OI.to(basis_II.dtype)) @ basis_II
            weight_OI.copy_(origin_OI + change_OI)
            self._changes.append(change_OI)
            if parameter.grad is not None:
                gradient_OI = outputs_first(parameter.grad, dim)
                gradient_OI.copy_(gradient_OI.to(basis_II.dtype) @ basis_II)

    def leave(self, rate: Rate | None) -> None:
        """After the step: pull Z's columns by min(1, rate · h), if there is a rate, and return to weights."""
        passed = [None] * len(self._maps) if rate is None else self.operator.passed(rate)
        rows = zip(self._maps, self._origins, self._changes, passed, strict=True)
        for (parameter, ref_OI, basis_II, dim), origin_OI, change_OI, passed_I in rows:
            weight_OI = outputs_first(parameter, dim)
            # the step alone: in 16 bits W U is too coarse for a small Z, which was kept
            change_OI += weight_OI.to(basis_II.dtype) - (origin_OI + change_OI).to(weight_OI.dtype)
            if passed_I is not None:
                change_OI *= passed_I
            weight_OI.copy_(torch.addmm(ref_OI.to(basis_II.dtype), change_OI, basis_II.t()))
        self._changes = []
