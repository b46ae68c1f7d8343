"""Subspace: directions in the space of all weights, along which an optimizer may not move them (OGD)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.errors import PriorMismatchError
from holdfast.hold.attach import Handle, hook, unwrap
from holdfast.importance.prior import parameters_by_name

_NEW = 1e-4  # the share of a vector that must be left beside the others; less is rounding error in float32


class Subspace:
    """An orthonormal basis over the concatenation of several weights, cut into one tensor a weight.

    Parameters
    ----------
    directions : mapping of str to Tensor, optional
        Canonical name to (K, *shape of the weight), float32: another subspace's `directions`, used as they
        are and not copied. Without them the subspace is empty.

    Notes
    -----
    Memory: K float32 values for each weight, so 4 K bytes. Each projection reads all of them twice.
    """

    def __init__(self, directions: Mapping[str, Tensor] | None = None) -> None:
        # sums over weights are taken in the order of their names, whatever the order of a file
        self.directions: dict[str, Tensor] = dict(sorted((directions or {}).items()))

    def __len__(self) -> int:
        return len(next(iter(self.directions.values()), ()))

    def extend(self, vectors: Iterable[Mapping[str, Tensor]], count: int) -> int:
        """Add the directions of some vectors, by Gram-Schmidt against all that is there, twice, in float32.

        Parameters
        ----------
        vectors : iterable of mappings of str to Tensor
            Canonical name to a tensor of the weight's shape, with the same names in each. They are taken
            one by one, so a generator keeps no more than one in memory.
        count : int
            How many there are at most: the memory for so many is taken before the first.

        Returns
        -------
        int
            How many directions were added. A vector in the span of the others (less than 1e-4 of it is left
            beside them) adds none.

        Raises
        ------
        PriorMismatchError
            The names or shapes are not those of the directions that are there.
        """
        known = before = len(self)
        rows: dict[str, Tensor] = {}
        for vector in vectors:
            rest = {name: value.to(torch.float32, copy=True) for name, value in vector.items()}
            if self.directions:
                _check_fits(self.directions, rest, "the vectors to add")
            if not rows:
                rows = self._with_room(rest, count)
                self.directions = {name: matrix[:known] for name, matrix in rows.items()}
            length = _length(rest)
            for _ in range(2):  # after one round what is left of a short rest is not orthogonal yet
                remove_(rest, self.directions, coefficients(rest, self.directions))
            left = _length(rest)
            if left > _NEW * length:
                for name, matrix in rows.items():
                    torch.div(rest[name], left, out=matrix[known])
                known += 1
            self.directions = {name: matrix[:known] for name, matrix in rows.items()}
        if known < before + count:  # give back what was not needed
            self.directions = {name: matrix.clone() for name, matrix in self.directions.items()}
        return known - before

    def _with_room(self, like: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The directions with room for `count` more behind them; the old tensors are given up one by one."""
        rows = {}
        for name, value in sorted(like.items()):
            old = self.directions.pop(name, value.new_empty(0, *value.shape)).to(value.device)
            rows[name] = torch.cat([old, value.new_zeros(count, *value.shape)])
        return rows

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        on: Literal["update", "gradient"] = "update",
        start: Mapping[str, Tensor] | None = None,
    ) -> Handle:
        """Project every step of this optimizer off the subspace, until the handle is removed.

        Parameters
        ----------
        on : {"update", "gradient"}
            ``update``: after each step θ ← θ − Σ_k q_k q_kᵀ(θ − θ_start), which is the same as projecting
            each step's change, and corrects rounding errors as well. It holds with every optimizer, weight
            decay included. ``gradient``: g ← g − Σ_k q_k q_kᵀ g before each step, after accumulation and
            clipping; the step itself is orthogonal with plain SGD only.
        start : mapping of str to Tensor, optional
            For ``update``: θ_start by canonical name, not to be changed while attached; copies of the
            present weights when omitted.

        Raises
        ------
        PriorMismatchError
            A weight of the subspace is not in the model or the optimizer, or has another shape.
        """
        if not len(self):
            return Handle()
        inner = unwrap(optimizer)
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        trained = {n: p for n, p in parameters_by_name(model).items() if id(p) in held and p.requires_grad}
        weights = {name: trained[name] for name in self.directions if name in trained}
        _check_fits(self.directions, weights, "what the optimizer trains")
        basis = {name: rows.to(weights[name].device) for name, rows in self.directions.items()}
        if on == "gradient":

            def project() -> None:
                for p in weights.values():
                    if p.grad is None:  # unused in this batch; the projection gives it a gradient
                        p.grad = torch.zeros_like(p)
                gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
                remove_(gradients, basis, coefficients(gradients, basis))

            return hook(inner, before=project, needs_gradients="a subspace with on='gradient'")
        first = {n: p.detach().clone() if start is None else start[n].to(p) for n, p in weights.items()}

        def take_back() -> None:
            remove_(weights, basis, coefficients(weights, basis, first))

        return hook(inner, after=take_back)


def coefficients(
    vector: Mapping[str, Tensor], basis: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Inner products (K,) of K directions with a vector, or with its distance from an origin; float32."""
    parts = []
    for name, rows in basis.items():
        value = vector[name].to(torch.promote_types(vector[name].dtype, rows.dtype))
        if origin is not None:
            value = value - origin[name]
        parts.append(rows.flatten(1) @ value.flatten().to(rows.dtype))
    return torch.stack(parts).sum(0)


def remove_(vector: Mapping[str, Tensor], basis: Mapping[str, Tensor], coefficients_K: Tensor) -> None:
    """In place: vector − Σ_k coefficient_k · direction_k."""
    for name, rows in basis.items():
        value = vector[name]
        value.sub_((coefficients_K @ rows.flatten(1)).view(value.shape).to(value.dtype))


def _length(vector: Mapping[str, Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(vector.values())))))


def _check_fits(directions: Mapping[str, Tensor], got: Mapping[str, Tensor], whose: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in got.items()}
    wrong = [
        f"{name} ({shapes.get(name, 'missing')} instead of {tuple(rows.shape[1:])})"
        for name, rows in directions.items()
        if shapes.get(name) != tuple(rows.shape[1:])
    ]
    wrong += [f"{name} (unknown to the subspace)" for name in got if name not in directions]
    if wrong:
        raise PriorMismatchError(
            f"subspace: its directions don't fit {whose}: {', '.join(wrong[:3])}. "
            "Train the same weights of the same model at every task."
        )
