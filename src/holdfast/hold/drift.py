"""The drift meter: how far a map's outputs on old, relevant inputs have moved, without an old example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast import world
from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold.inputs import outputs_first
from holdfast.importance.prior import ImportancePrior, parameters_by_name
from holdfast.models import input_dims


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
    for name, c_II in prior.mean_normalised().tensors.items():
        # of a sharded weight the rows that are here: the meter is a sum over rows
        before, now = reference[name].detach(), world.local(named[name].detach())
        before = (before if before.shape == now.shape else world.like(before, named[name])).double()
        change = now.double() - before.to(now.device)
        c_II = c_II.double().to(change.device)
        moved[name] = _moment(outputs_first(change, dims[name]), c_II)
        whole[name] = _moment(outputs_first(before.to(change.device), dims[name]), c_II)
    if any(world.is_sharded(named[name]) for name in moved):
        moved, whole = (
            {name: sum(part[name] for part in parts) for name in moved}
            for parts in (world.gather(moved), world.gather(whole))
        )
    maps = {name: moved[name] / whole[name] if whole[name] > 0 else 0.0 for name in moved}
    return Drift(maps, sum(moved.values()) / (sum(whole.values()) or 1.0))


def _moment(weight_OI: Tensor, c_II: Tensor) -> float:
    """tr(W C Wᵀ)."""
    return float(((weight_OI @ c_II) * weight_OI).sum())
