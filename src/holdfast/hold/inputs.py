"""Inputs: H Δ = Δ U diag(h) Uᵀ, held directions of what goes into a linear map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.hold.basis import Basis
from holdfast.hold.operator import Rate
from holdfast.precision import products_for

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Inputs:
    """A share for each direction of a map's inputs, whatever its outputs.

    With C = U diag(c) Uᵀ the second moment of the old inputs that matter, tr(Δ C Δᵀ) is how far old outputs
    move under a change Δ of the map. Holding Δ along U by shares that grow with c leaves free what old
    inputs don't use.

    Parameters
    ----------
    shares : list of Tensor (I,)
        h of each map's directions. Only with a rate may they exceed 1.
    bases : list of Basis
        U, directions in columns; all products are made in its type.
    dims : list of int
        Which dimension of the weight is the input: 1 in `torch.nn.Linear`, 0 in transformers' Conv1D.

    Notes
    -----
    Where all directions of a map are held fully, `blend_` gives `towards` bit for bit. A single held
    direction u keeps the output of a map up to rounding: what W u differs by comes from rounding the new
    weights (half a unit in the last place of each) and from U's orthogonality (Δ's size times 1e-6 in
    float32). Where u is a coordinate axis it is exact.
    """

    def __init__(self, shares: list[Tensor], bases: Sequence[Basis], dims: list[int]) -> None:
        self.shares, self.bases, self.dims = shares, bases, dims

    def passed(self, rate: Rate | None) -> list[Tensor]:
        """1 − min(1, rate · h), or 1 − h, of each map's directions."""
        return [1 - (h if rate is None else (h * rate).clamp_(max=1.0)) for h in self.shares]

    def blend_(
        self, values: Sequence[Tensor | None], towards: Sequence[Tensor], rate: Rate | None = None
    ) -> None:
        """See `Operator.blend_`."""
        self.scale_(values, towards, self.passed(rate))

    def scale_(
        self, values: Sequence[Tensor | None], towards: Sequence[Tensor], passed: Sequence[Tensor]
    ) -> None:
        """values ← towards + Δ U diag(passed) Uᵀ, Δ = values − towards; what is None is left out."""
        rows = zip(values, towards, passed, self.bases, self.dims, strict=True)
        for value, target, passed_I, basis, dim in rows:
            if value is None:
                continue
            target_OI = outputs_first(target, dim).to(basis.dtype)
            change_OI = outputs_first(value, dim).to(basis.dtype) - target_OI
            outputs_first(value, dim).copy_(target_OI + _along(change_OI, basis, passed_I))

    def squares(self, values: Sequence[Tensor], towards: Sequence[Tensor]) -> list[Tensor]:
        """|(ΔU)_j|² of each map's directions, Δ = values − towards."""
        found = []
        for value, target, basis, dim in zip(values, towards, self.bases, self.dims, strict=True):
            wide = basis.dtype
            change_OI = outputs_first(value, dim).to(wide) - outputs_first(target, dim).to(wide)
            found.append(square_lengths(basis.into(change_OI)))
        return found

    def reduce_(self, changes: Sequence[Tensor | None]) -> None:
        """See `Operator.reduce_`."""
        self._scale(changes, self.passed(None))

    def times_(self, changes: Sequence[Tensor]) -> None:
        """See `Operator.times_`."""
        self._scale(changes, self.shares)

    def energy(self, changes: Sequence[Tensor]) -> Tensor:
        """See `Operator.energy`."""
        rows = zip(changes, self.shares, self.bases, self.dims, strict=True)
        parts = [(u.into(outputs_first(c, dim).to(u.dtype)) ** 2 * h).sum() for c, h, u, dim in rows]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _scale(self, changes: Sequence[Tensor | None], factors: list[Tensor]) -> None:
        for change, factor_I, basis, dim in zip(changes, factors, self.bases, self.dims, strict=True):
            if change is not None:
                change_OI = outputs_first(change, dim)
                change_OI.copy_(_along(change_OI.to(basis.dtype), basis, factor_I))


def outputs_first(weight: Tensor, dim: int) -> Tensor:
    """A map's weight as a view (O, I), whose input dimension is `dim`."""
    return weight if dim == 1 else weight.t()


def square_lengths(change_OI: Tensor) -> Tensor:
    """Of each column, (I,)."""
    return torch.linalg.vector_norm(change_OI, dim=0).square()


def _along(change_OI: Tensor, basis: Basis, factor_I: Tensor) -> Tensor:
    """Δ U diag(factor) Uᵀ."""
    return basis.back(basis.into(change_OI).mul_(factor_I))


def _into_weights(weight_OI: Tensor, change_OI: Tensor, ref_OI: Tensor, basis: Basis) -> Tensor:
    """W = W* + Z Uᵀ, written into a weight."""
    if weight_OI.dtype == change_OI.dtype:
        basis.back(change_OI, ref_OI, out=weight_OI)
    else:
        weight_OI.copy_(basis.back(change_OI, ref_OI.to(basis.dtype)))
    return weight_OI


class Coordinates:
    """Lets an optimizer step in the basis in which an `Inputs` hold is diagonal.

    Adam divides by each weight's own history, so what a hold takes away along a direction of inputs, Adam on
    the weights gives back along mixtures of directions. Between `enter` and `leave` each parameter holds
    W U, and its gradient is G U: moments, weight decay, and whatever looks at a weight's norm (which the
    rotation keeps) act there. Z = (W − W*) U takes the step's change; its columns are pulled, and
    W = W* + Z Uᵀ.

    Parameters
    ----------
    parameters, references : list of Tensor
        W and W* of each map. W* must not change meanwhile.
    operator : Inputs
    carried : bool
        Whether Z goes on from step to step: two products of O by I with U a map and step. Otherwise it is
        made of W at each, which takes a third. So it is where W is not as `leave` left it: somebody has set
        weights, or a training goes on whose Z was not kept (`state`).

    Notes
    -----
    After the step ``.grad`` is that in the rotated coordinates. Memory, in float32: W* U and Z, and room for
    one map. Of 16-bit weights a carried Z keeps what W rounds away. A step that fails in between must be
    followed by `undo`.
    """

    def __init__(
        self, parameters: list[Tensor], references: list[Tensor], operator: Inputs, *, carried: bool = True
    ) -> None:
        self.operator, self.carried = operator, carried
        rows = zip(parameters, references, operator.bases, operator.dims, strict=True)
        self._maps = [(p, outputs_first(ref, dim), u, dim) for p, ref, u, dim in rows]
        self._origins = [u.into(ref_OI.to(u.dtype)) for _, ref_OI, u, _ in self._maps]
        self._changes = [torch.zeros_like(origin_OI) for origin_OI in self._origins]
        self._left: list[int | None] = [None] * len(self._maps)  # how each weight was when Z was right
        self._moving = [True] * len(self._maps)  # which of them this step is of
        self._inside = [False] * len(self._maps)  # which hold W U now
        self._dtypes = {parameter.dtype for parameter in parameters}
        # pages that are new at each step cost more than what is written to them
        sizes = {(o.device, o.dtype): 0 for o in self._origins}
        for o in self._origins:
            sizes[o.device, o.dtype] = max(sizes[o.device, o.dtype], o.numel())
        self._room = {key: torch.empty(n, device=key[0], dtype=key[1]) for key, n in sizes.items()}

    def _room_for(self, like_OI: Tensor) -> Tensor:
        """Memory for intermediate results of one map."""
        return self._room[like_OI.device, like_OI.dtype][: like_OI.numel()].view(like_OI.shape)

    def _marks(self) -> list[int]:
        """Sums of the weights' bits: they tell whether somebody has set weights, even by ``.data``."""
        return [int(number) for number in torch.stack([_bits(p) for p, _, _, _ in self._maps]).tolist()]

    def state(self) -> list[Tensor | None]:
        """Z of each map, for `load_state`; None where it would be made of W. It is the memory itself."""
        if not self.carried:
            return [None] * len(self._maps)
        rows = zip(self._changes, self._left, self._marks(), strict=True)
        return [change_OI if mark == left else None for change_OI, left, mark in rows]

    def load_state(self, changes: Sequence[Tensor | None]) -> None:
        """Go on from Z of each map, where it gives the weights that are there, bit for bit."""
        rows = zip(self._maps, self._changes, changes, self._marks(), strict=True)
        with products_for(self._dtypes):
            for at, ((parameter, ref_OI, basis, dim), change_OI, kept_OI, mark) in enumerate(rows):
                self._left[at] = None
                if self.carried and kept_OI is not None and kept_OI.shape == change_OI.shape:
                    weight_OI = outputs_first(parameter, dim)
                    change_OI.copy_(kept_OI)
                    # laid out as the weight is: a product's rounding depends on it
                    back_OI = _into_weights(torch.empty_like(weight_OI), change_OI, ref_OI, basis)
                    self._left[at] = mark if torch.equal(back_OI, weight_OI) else None

    def enter(self, moving: Sequence[bool] | None = None) -> None:
        """Before the step: W becomes W U, and its gradient G U.

        Parameters
        ----------
        moving : sequence of bool, optional
            Which of the maps this step is of; the others stay as they are. By default it is of all.
        """
        self._moving = [True] * len(self._maps) if moving is None else list(moving)
        with products_for(self._dtypes):
            self._enter()

    def _enter(self) -> None:
        known = self.carried and any(left is not None for left in self._left)
        marks = self._marks() if known else [0] * len(self._maps)
        rows = zip(self._maps, self._origins, self._changes, self._left, marks, self._moving, strict=True)
        for at, ((parameter, _, basis, dim), origin_OI, change_OI, left, mark, moves) in enumerate(rows):
            if not moves:
                continue
            weight_OI, room_OI = outputs_first(parameter, dim), self._room_for(origin_OI)
            if left is None or left != mark:
                self._make(at)
            self._inside[at] = True
            if weight_OI.dtype == room_OI.dtype:
                torch.add(origin_OI, change_OI, out=weight_OI)
            else:
                weight_OI.copy_(torch.add(origin_OI, change_OI, out=room_OI))
            if parameter.grad is not None:
                gradient_OI = outputs_first(parameter.grad, dim)
                gradient_OI.copy_(basis.into(gradient_OI.to(basis.dtype), out=room_OI))

    def _make(self, at: int) -> None:
        """Z of one map, of what its weight is."""
        (parameter, ref_OI, basis, dim), change_OI = self._maps[at], self._changes[at]
        weight_OI, room_OI = outputs_first(parameter, dim), self._room_for(change_OI)
        if weight_OI.dtype == room_OI.dtype:  # one pass where 16 bits take two
            basis.into(torch.sub(weight_OI, ref_OI, out=room_OI), out=change_OI)
        else:
            basis.into(room_OI.copy_(weight_OI).sub_(ref_OI), out=change_OI)

    def stepped(self) -> None:
        """After the step: take what it changed into Z."""
        rows = zip(self._maps, self._origins, self._changes, self._moving, strict=True)
        for (parameter, _, _, dim), origin_OI, change_OI, moves in rows:
            if not moves:
                continue
            weight_OI, room_OI = outputs_first(parameter, dim), self._room_for(origin_OI)
            # the step alone: in 16 bits W U is too coarse for a small Z, which was kept
            torch.add(origin_OI, change_OI, out=room_OI)
            if weight_OI.dtype != room_OI.dtype:
                room_OI.copy_(room_OI.to(weight_OI.dtype))
            change_OI.add_(torch.sub(weight_OI, room_OI, out=room_OI))

    def squares(self) -> list[Tensor]:
        """|Z_j|² of each map's directions, after `stepped`."""
        with products_for(self._dtypes):
            for at, (left, moves) in enumerate(zip(self._left, self._moving, strict=True)):
                if left is None and not moves:  # it was never entered, so its Z is of no weight
                    self._make(at)
        return [square_lengths(change_OI) for change_OI in self._changes]

    def leave(self, passed: Sequence[Tensor] | None) -> None:
        """Multiply Z's columns by `passed`, if there is any, and return to weights."""
        with products_for(self._dtypes):
            self._leave(passed)

    def _leave(self, passed: Sequence[Tensor] | None) -> None:
        factors = [None] * len(self._maps) if passed is None else passed
        rows = zip(self._maps, self._changes, factors, self._moving, strict=True)
        for at, ((parameter, ref_OI, basis, dim), change_OI, passed_I, moves) in enumerate(rows):
            if not moves:
                continue
            weight_OI = outputs_first(parameter, dim)
            if passed_I is not None:
                change_OI *= passed_I
            _into_weights(weight_OI, change_OI, ref_OI, basis)
            self._inside[at] = False
        if self.carried:
            kept = zip(self._left, self._marks(), self._moving, strict=True)
            self._left = [mark if moves else left for left, mark, moves in kept]

    def undo(self) -> None:
        """Return to weights, and gradients, from where a step failed: without it, or with all of it."""
        with products_for(self._dtypes):
            rows = zip(self._maps, self._changes, self._inside, strict=True)
            for at, ((parameter, ref_OI, basis, dim), change_OI, inside) in enumerate(rows):
                if not inside:
                    continue
                _into_weights(outputs_first(parameter, dim), change_OI, ref_OI, basis)
                if parameter.grad is not None:
                    gradient_OI = outputs_first(parameter.grad, dim)
                    gradient_OI.copy_(basis.back(gradient_OI.to(basis.dtype)))
                self._left[at], self._inside[at] = None, False


def _bits(weight: Tensor) -> Tensor:
    """The sum of a weight's bits, in words of 64: in narrower ones to halve or negate all would not show."""
    size = weight.element_size()
    aligned = (weight.numel() * size) % 8 == 0 and (weight.storage_offset() * size) % 8 == 0
    if weight.is_contiguous() and aligned:
        return weight.view(-1).view(torch.int64).sum()
    return weight.view(_BITS[size]).sum(dtype=torch.int64)  # which takes ten times as long
