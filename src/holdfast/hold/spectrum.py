"""Spectrum: a prior as H = F diag(values) Fᵀ, which a mechanism scales, clips and hands to an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.hold.attach import Chunk, bind, place
from holdfast.hold.drift import Meter, Rotated
from holdfast.hold.elementwise import Elementwise
from holdfast.hold.inputs import Inputs
from holdfast.hold.operator import Operator
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
        ascending, scaled to mean 1.
    bases : dict of str to Tensor
        Of the kind ``inputs``: U (I, I), float64, eigenvectors in columns. Otherwise empty.
    """

    prior: ImportancePrior
    values: dict[str, Tensor]
    bases: dict[str, Tensor]

    @classmethod
    def of(cls, prior: ImportancePrior) -> Spectrum:
        """The prior as it is; matrices are scaled to mean eigenvalue 1 and decomposed, in float64."""
        if prior.kind == "weights":
            return cls(prior, prior.tensors, {})
        values, bases = {}, {}
        for name, c_II in prior.mean_normalised().tensors.items():
            c_I, bases[name] = eigenvectors(c_II)
            values[name] = c_I.clamp(min=0).float()
        # directions of equal weight are arbitrary, and all processes must step in the same
        world.agree([*values.values(), *bases.values()])
        return cls(prior, values, bases)

    def bind(self, model: nn.Module, optimizer: Optimizer) -> tuple[Optimizer, list[Chunk]]:
        """Find the weights in the model and in the optimizer, see `holdfast.hold.attach.bind`."""
        return bind(self.prior, model, optimizer)

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
        if not self.bases:
            owners = list(zip(chunk.names, chunk.owners, strict=True))
            shares = [place(values[name], owner) for name, owner in owners]
            if partial:
                rows = zip(owners, shares, strict=True)
                shares = [_below_one(world.like(values[n], owner), s) for (n, owner), s in rows]
            return Elementwise(shares)
        dims = input_dims(model)
        kinds = [(p.device, torch.promote_types(p.dtype, torch.float32)) for _, p in pairs]
        return Inputs(
            [values[n].to(*kind, copy=True) for (n, _), kind in zip(pairs, kinds, strict=True)],
            [self.bases[n].to(*kind, copy=True) for (n, _), kind in zip(pairs, kinds, strict=True)],
            [dims[name] for name, _ in pairs],
        )

    def meter(
        self, chunks: Sequence[Chunk], operators: Sequence[Operator], references: Sequence[list[Tensor]]
    ) -> Meter | None:
        """How far old outputs have moved from the references; None of a prior by weight."""
        if not self.bases:
            return None

        def maps() -> list[Rotated]:
            found = []
            for chunk, operator, reference in zip(chunks, operators, references, strict=True):
                assert isinstance(operator, Inputs)
                rows = zip(
                    chunk.names, chunk.parameters, reference, operator.bases, operator.dims, strict=True
                )
                found += [Rotated(n, p, r, u, self.values[n].to(u), dim) for n, p, r, u, dim in rows]
            return found

        sharded = any(p is not o for c in chunks for p, o in zip(c.parameters, c.owners, strict=True))
        return Meter(maps, sharded)


def eigenvectors(c_II: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (I,), ascending, and U (I, I) of a symmetric matrix, in float64, on the matrix's device.

    They are made on the GPU where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else c_II.device
    # a copy: the last bits of a decomposition may depend on how a file's memory is aligned
    values_I, basis_II = torch.linalg.eigh(c_II.to(device, torch.float64, copy=True))
    return values_I.to(c_II.device), basis_II.to(c_II.device)


def _below_one(exact: Tensor, placed: Tensor) -> Tensor:
    if placed.dtype in (torch.float32, torch.float64):
        return placed
    below_one = 1 - torch.finfo(placed.dtype).eps / 2
    return torch.where((exact < 1).to(placed.device) & (placed == 1), below_one, placed)
