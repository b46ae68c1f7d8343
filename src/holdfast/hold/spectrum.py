"""Spectrum: a prior as H = F diag(values) Fᵀ, which a mechanism scales, clips and hands to an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.hold.attach import Chunk, bind, place
from holdfast.hold.basis import basis_of
from holdfast.hold.drift import Meter, Rotated
from holdfast.hold.elementwise import Elementwise
from holdfast.hold.inputs import Inputs
from holdfast.hold.operator import Operator
from holdfast.importance.moments import mean_eigenvalue_one, spectrum
from holdfast.importance.prior import ImportancePrior
from holdfast.models import input_dims


@dataclass(frozen=True)
class Spectrum:
    """What a prior says of each weight, in the frame in which it is a number for each coordinate.

    Attributes
    ----------
    prior : ImportancePrior
    values : dict of str to Tensor
        By canonical name. Of a prior by weight its tensors. Of the kind ``inputs`` the eigenvalues (I,) of C,
        scaled to mean 1, see `holdfast.importance.moments.spectrum`.
    directions : dict of str to Tensor
        Of the kind ``inputs``: eigenvectors in columns, float64: all (I, I), or the K largest ones' where
        the prior has no more. Otherwise empty.
    """

    prior: ImportancePrior
    values: dict[str, Tensor]
    directions: dict[str, Tensor]

    @classmethod
    def of(cls, prior: ImportancePrior) -> Spectrum:
        """The prior as it is; moments are scaled to mean eigenvalue 1 and decomposed, in float64."""
        values, directions = dict(prior.tensors), dict[str, Tensor]()
        if prior.kind == "inputs":
            for name, c in prior.tensors.items():
                c_I, directions[name] = spectrum(mean_eigenvalue_one(c))
                values[name] = c_I.clamp(min=0).float()
        return cls(prior, values, directions)

    def bind(
        self, model: nn.Module, optimizer: Optimizer, *, begun: bool = False
    ) -> tuple[Optimizer, list[Chunk]]:
        """Find the weights in the model and in the optimizer, see `holdfast.hold.attach.bind`.

        Of several processes (also of a script's own) all then have the values and directions of rank 0:
        directions of equal weight are arbitrary, a rating may differ in its last bits, and replicas that step
        otherwise stay apart.
        """
        world.join()
        if world.size() > 1:
            for found in (self.values, self.directions):
                found.update({name: tensor.clone() for name, tensor in found.items()})  # not the prior's own
                world.agree(found.values())
        return bind(self.prior, model, optimizer, begun=begun)

    def operator(
        self, chunk: Chunk, model: nn.Module, values: Mapping[str, Tensor], *, partial: bool = False
    ) -> Operator:
        """H = F diag(values) Fᵀ for the weights of a chunk.

        Parameters
        ----------
        values : mapping of str to Tensor
            Made of this spectrum's `values`, with the same shapes.
        partial : bool
            Keep a share below 1 below 1, where a 16-bit dtype would round it up and freeze the weight.
        """
        pairs = list(zip(chunk.names, chunk.parameters, strict=True))
        if not self.directions:
            owners = list(zip(chunk.names, chunk.owners, strict=True))
            rows = zip(owners, chunk.parameters, strict=True)
            shares = [place(values[name], owner, part) for (name, owner), part in rows]
            if partial:
                placed = zip(owners, shares, strict=True)
                shares = [_below_one(world.like(values[n], owner), s) for (n, owner), s in placed]
            return Elementwise(shares)
        dims = input_dims(model)
        kinds = [(p.device, torch.promote_types(p.dtype, torch.float32)) for _, p in pairs]
        return Inputs(
            [values[n].to(*kind, copy=True) for (n, _), kind in zip(pairs, kinds, strict=True)],
            [
                basis_of(self.directions[n], device=device, dtype=dtype)
                for (n, _), (device, dtype) in zip(pairs, kinds, strict=True)
            ],
            [dims[name] for name, _ in pairs],
        )

    def meter(
        self, chunks: Sequence[Chunk], operators: Sequence[Operator], references: Sequence[list[Tensor]]
    ) -> Meter | None:
        """How far old outputs have moved from the references; None of a prior by weight."""
        if not self.directions:
            return None

        def maps() -> list[Rotated]:
            found = []
            for chunk, operator, reference in zip(chunks, operators, references, strict=True):
                assert isinstance(operator, Inputs)
                rows = zip(
                    chunk.names, chunk.parameters, reference, operator.bases, operator.dims, strict=True
                )
                found += [
                    Rotated(n, p, r, u, self.values[n].to(p.device, u.dtype), dim) for n, p, r, u, dim in rows
                ]
            return found

        sharded = not all(chunk.is_whole for chunk in chunks)
        return Meter(maps, sharded)


def _below_one(exact: Tensor, placed: Tensor) -> Tensor:
    if placed.dtype in (torch.float32, torch.float64):
        return placed
    below_one = 1 - torch.finfo(placed.dtype).eps / 2
    return torch.where((exact < 1).to(placed.device) & (placed == 1), below_one, placed)
