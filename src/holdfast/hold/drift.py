"""The drift meter: how far a map's outputs on old, relevant inputs have moved, without an old example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast import world
from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold.basis import Basis
from holdfast.hold.inputs import outputs_first, square_lengths
from holdfast.importance.moments import energy
from holdfast.importance.prior import ImportancePrior, parameters_by_name
from holdfast.models import input_dims

MOVED = "old_outputs_moved"  # beside the loss in a Trainer's log: `Drift.percent`


class Drift(NamedTuple):
    """Relative mean squared changes of outputs, from 0 (none).

    Attributes
    ----------
    maps : dict of str to float
        Of each linear map, by its weight's canonical name: tr(Δ C Δᵀ) / tr(W* C W*ᵀ).
    total : float
        The sum of all numerators by the sum of all denominators.
    """

    maps: dict[str, float]
    total: float

    @property
    def percent(self) -> float:
        """100 √total: by how much of their own size old outputs moved, in root mean square."""
        return float(100 * self.total**0.5)


@torch.no_grad()
def drift(prior: ImportancePrior, model: nn.Module, reference: Mapping[str, Tensor]) -> Drift:
    """How much the outputs of each map on the inputs that a prior was made of have changed since a reference.

    With C = E Σ_t r_t x_t x_tᵀ, tr(Δ C Δᵀ) = E Σ_t r_t |Δ x_t|²: each map by itself, on the inputs that it
    had when C was made. What earlier maps' changes do to its inputs is not in it.

    Parameters
    ----------
    prior : ImportancePrior
        Of the kind ``inputs``.
    reference : mapping of str to Tensor
        W*, by canonical name: the weights at the start of the task, or when C was made.

    Returns
    -------
    Drift
        Maps whose W* C W*ᵀ is 0 (nothing relevant went through them) count as 0.

    Raises
    ------
    ConfigError
        The prior is of another kind.
    PriorMismatchError
        A weight of the prior is not in the model or in the reference.
    """
    if prior.kind != "inputs":
        raise ConfigError(
            "drift: got a prior by weight. How far outputs moved can be told from the inputs alone: compute "
            "the prior with the importance 'inputs'."
        )
    named, dims = parameters_by_name(model), input_dims(model)
    missing = [name for name in prior.tensors if name not in dims or name not in reference]
    if missing:
        raise PriorMismatchError(f"drift: model or reference lack the linear map '{missing[0]}'.")
    moved: dict[str, float] = {}
    whole: dict[str, float] = {}
    for name, c in prior.mean_normalised().tensors.items():
        # of a sharded weight the rows that are here: the meter is a sum over rows
        before, now = reference[name].detach(), world.local(named[name])
        before = (before if before.shape == now.shape else world.like(before, named[name])).double()
        change = now.double() - before.to(now.device)
        moved[name] = energy(outputs_first(change, dims[name]), c)
        whole[name] = energy(outputs_first(before.to(change.device), dims[name]), c)
    return relative(moved, whole, any(world.is_stepped_in_parts(named[name]) for name in moved))


def relative(moved: Mapping[str, float], whole: Mapping[str, float], sharded: bool = False) -> Drift:
    """Numerators and denominators by map; of weights in parts, those of this process's parts."""
    if sharded:
        moved, whole = (
            {name: sum(part[name] for part in parts) for name in moved}
            for parts in (world.gather(dict(moved)), world.gather(dict(whole)))
        )
    maps = {name: moved[name] / whole[name] if whole[name] > 0 else 0.0 for name in moved}
    return Drift(maps, sum(moved.values()) / (sum(whole.values()) or 1.0))


@dataclass(frozen=True)
class Rotated:
    """A map as a hold has it: W, W*, and C = U diag(c) Uᵀ, of mean 1, on the weight's device."""

    name: str
    weight: Tensor
    reference: Tensor
    basis: Basis
    values_I: Tensor
    dim: int

    def change(self) -> Tensor:
        """tr(Δ C Δᵀ) = Σ_j c_j |(ΔU)_j|², a scalar on the device."""
        wide = self.basis.dtype
        change = outputs_first(self.weight, self.dim).to(wide) - outputs_first(self.reference, self.dim).to(
            wide
        )
        return self._moment(change)

    def whole(self) -> Tensor:
        """tr(W* C W*ᵀ)."""
        return self._moment(outputs_first(self.reference, self.dim).to(self.basis.dtype))

    def _moment(self, weight_OI: Tensor) -> Tensor:
        return square_lengths(self.basis.into(weight_OI)) @ self.values_I


class Meter:
    """`drift` of what a hold has at hand: one product O x I x I a map, in the hold's precision (float32).

    Nothing is copied, and the device is waited for once a reading. The references must not change.

    Parameters
    ----------
    maps : callable
        The maps as they are held now; some may have joined since the last reading.
    sharded : bool
        Whether each process has a part of each weight alone.
    """

    def __init__(self, maps: Callable[[], list[Rotated]], sharded: bool = False) -> None:
        self.maps, self.sharded = maps, sharded
        self._whole: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self) -> Drift:
        """As the weights are now."""
        maps = self.maps()
        new = [m for m in maps if m.name not in self._whole]
        self._whole.update(zip([m.name for m in new], _numbers([m.whole() for m in new]), strict=True))
        moved = _numbers([m.change() for m in maps])
        return relative(dict(zip([m.name for m in maps], moved, strict=True)), self._whole, self.sharded)


def _numbers(scalars: list[Tensor]) -> list[float]:
    """One transfer a device."""
    found = [0.0] * len(scalars)
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(scalars):
        by_device.setdefault(value.device, []).append(index)
    for indices in by_device.values():
        for index, number in zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True):
            found[index] = number
    return found
