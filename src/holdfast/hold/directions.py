"""Directions: H = Σ_k q_k q_kᵀ over all weights together, directions along which they are held (OGD)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold.attach import Chunk, groups_of, unwrap
from holdfast.hold.operator import Rate
from holdfast.hold.zero import Steps
from holdfast.importance.prior import parameters_by_name

_NEW = 1e-4  # the share of a vector that must be left beside the others; less is rounding error in float32


class Directions:
    """An orthonormal basis over the concatenation of several weights, cut into one tensor a weight.

    Parameters
    ----------
    directions : mapping of str to Tensor, optional
        Canonical name to (K, *shape of the weight), float32: another's `directions`, used as they
        are and not copied. Without them there are none.

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
            basis = list(self.directions.values())
            part = [rest[name] for name in self.directions]
            for _ in range(2):  # after one round what is left of a short rest is not orthogonal yet
                remove_(part, basis, coefficients(part, basis))
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

    def bind(self, model: nn.Module, optimizer: Any) -> tuple[Optimizer, list[Chunk]]:
        """Find the weights in the optimizer: one chunk of all, because a direction goes through all of them.

        Raises
        ------
        PriorMismatchError
            A weight of the directions is not in the model or the optimizer, or has another shape.
        """
        inner = unwrap(optimizer)
        if not len(self):
            return inner, []
        held = groups_of(inner)
        trained = {n: p for n, p in parameters_by_name(model).items() if id(p) in held and p.requires_grad}
        weights = {name: trained[name] for name in self.directions if name in trained}
        _check_fits(self.directions, weights, "what the optimizer trains")
        if isinstance(inner, Steps) or any(map(world.is_sharded, weights.values())):
            raise ConfigError(
                "directions: a direction goes through all weights together, and these are stepped in parts "
                "(FSDP2, ZeRO). Use one process or DDP, or a hold by weight or by inputs."
            )
        return inner, [Chunk(0, list(self.directions), [weights[name] for name in self.directions])]

    def operator(self, chunk: Chunk) -> Projector:
        """H on the weights that `bind` found."""
        rows = (self.directions[name] for name in chunk.names)
        return Projector([r.to(p.device) for r, p in zip(rows, chunk.parameters, strict=True)])


class Projector:
    """H = Σ_k q_k q_kᵀ over the weights of a list together, q_k orthonormal.

    Parameters
    ----------
    rows : list of Tensor (K, *shape of the weight)
        The directions, cut into one tensor a weight.
    """

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def blend_(
        self, values: Sequence[Tensor | None], towards: Sequence[Tensor], rate: Rate | None = None
    ) -> None:
        """See `Operator.blend_`. θ ← θ − H (θ − θ*): a weight far from all directions stays bit for bit."""
        if rate is not None:
            raise ValueError("directions are held fully: they take no rate")
        rows = [r for r, value in zip(self.rows, values, strict=True) if value is not None]
        origins = [t for t, value in zip(towards, values, strict=True) if value is not None]
        moved = [value for value in values if value is not None]
        remove_(moved, rows, coefficients(moved, rows, origins))

    def reduce_(self, changes: Sequence[Tensor | None]) -> None:
        """See `Operator.reduce_`; all changes must be there, as a direction goes through all weights."""
        every = [change for change in changes if change is not None]
        remove_(every, self.rows, coefficients(every, self.rows))

    def times_(self, changes: Sequence[Tensor]) -> None:
        """See `Operator.times_`."""
        inside_K = coefficients(changes, self.rows)
        for change, rows in zip(changes, self.rows, strict=True):
            change.copy_((inside_K @ rows.flatten(1)).view(change.shape).to(change.dtype))

    def energy(self, changes: Sequence[Tensor]) -> Tensor:
        """See `Operator.energy`."""
        return coefficients(changes, self.rows).square().sum()


def coefficients(
    vector: Sequence[Tensor], basis: Sequence[Tensor], origin: Sequence[Tensor] | None = None
) -> Tensor:
    """Inner products (K,) of K directions with a vector, or with its distance from an origin; float32."""
    parts = []
    for number, (value, rows) in enumerate(zip(vector, basis, strict=True)):
        value = value.to(torch.promote_types(value.dtype, rows.dtype))
        if origin is not None:
            value = value - origin[number]
        parts.append(rows.flatten(1) @ value.flatten().to(rows.dtype))
    return torch.stack(parts).sum(0)


def remove_(vector: Sequence[Tensor], basis: Sequence[Tensor], coefficients_K: Tensor) -> None:
    """In place: vector − Σ_k coefficient_k · direction_k."""
    for value, rows in zip(vector, basis, strict=True):
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
    wrong += [f"{name} (unknown to the directions)" for name in got if name not in directions]
    if wrong:
        raise PriorMismatchError(
            f"directions: they don't fit {whose}: {', '.join(wrong[:3])}. "
            "Train the same weights of the same model at every task."
        )
