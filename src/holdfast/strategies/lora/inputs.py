"""What goes into each adapted layer: its second moment, and the directions that hold most of it (GPM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.attribution.targets import pass_through
from holdfast.hold.cost import Cost
from holdfast.importance.moments import spectrum
from holdfast.models.adapters import lora_layers
from holdfast.tasks.encode import Encoded

ROUNDING = 1e-6  # share of an energy that float32 moments and projectors can't tell from none


@torch.no_grad()
def input_moments(model: Any, rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """H Hᵀ of each adapted layer, H its inputs at all tokens of the rows: (input, input), float32.

    The rows go through the model one by one, prompt and answer, so there is no padding to be told apart.
    """
    layers = lora_layers(model)
    found = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.lora_A["default"].weight.device)
        for name, layer in layers.items()
    }

    def watch(name: str) -> Any:
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_ND = args[0].detach().float().flatten(0, -2)
            found[name].addmm_(x_ND.T, x_ND)

        return take

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    pass_through(model, rows, pad_id, hooks)
    return found


def beside(moment_DD: Tensor, held_DD: Tensor | None) -> Tensor:
    """(I - M) H Hᵀ (I - M): the moment of what the projector M leaves of the inputs; float64."""
    moment = moment_DD.double()
    if held_DD is None:
        return moment
    free = torch.eye(len(moment), dtype=torch.float64, device=moment.device) - held_DD.to(moment)
    return free @ moment @ free


def leading(moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), largest first, not below 0, and their directions as rows (D, D); float64."""
    values_D, columns_DD = torch.linalg.eigh((moment_DD + moment_DD.T) / 2)
    return values_D.flip(0).clamp(min=0), columns_DD.flip(1).T


def freed(rows_RD: Tensor, moment: Tensor, pull: float) -> Tensor:
    """Rows turned towards what old inputs leave free: each times (1 + pull · C)⁻¹, its norm as before.

    Parameters
    ----------
    moment : Tensor
        C, of any scale and form (`holdfast.importance.moments`): its mean eigenvalue counts as 1. Of zeros
        the rows come back.
    pull : float
        A row keeps about 1 / pull of its part along a direction of mean importance; of a projector and
        without end it keeps nothing of what is held.
    """
    values_D, directions_DK = spectrum(moment.to(rows_RD.device))
    values_D = values_D.clamp(min=0)
    mean = float(values_D.mean())
    if mean <= 0:
        return rows_RD
    known = directions_DK.shape[1]
    wide_RD = rows_RD.double()
    inside_RK = wide_RD @ directions_DK
    free_RD = (inside_RK / (1 + pull * values_D[:known] / mean)) @ directions_DK.T
    if known < len(directions_DK):  # the others' mean holds what is beside them
        beside_RD = wide_RD - inside_RK @ directions_DK.T
        free_RD += beside_RD / (1 + pull * values_D[known] / mean)
    sizes_R = wide_RD.norm(dim=1) / free_RD.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return (free_RD * sizes_R[:, None]).to(rows_RD.dtype)


def extended(held_DD: Tensor | None, moment_DD: Tensor, energy: float) -> Tensor:
    """The projector on the held directions and as many new ones as it takes to hold `energy` of the inputs.

    GPM's rule: the fewest leading directions u_1 ... u_k of what the held ones leave of H, so that
    ‖M H‖² + sum_i ‖u_iᵀ H‖² >= energy ‖H‖² (Frobenius norms).

    Parameters
    ----------
    held_DD : Tensor, optional
        The projector M so far, if there is one.
    moment_DD : Tensor
        H Hᵀ.
    energy : float
        In (0, 1].

    Returns
    -------
    Tensor
        (D, D), float32, on the CPU.
    """
    total = float(moment_DD.double().trace())
    values_D, rows_DD = leading(beside(moment_DD, held_DD))
    kept = 0.0 if held_DD is None else total - float(values_D.sum())
    wanted = energy * total * (1 - ROUNDING)
    count = 0 if kept >= wanted else int((kept + values_D.cumsum(0) < wanted).sum()) + 1
    new_KD = rows_DD[:count]
    new_DD = new_KD.T @ new_KD
    return (new_DD if held_DD is None else new_DD + held_DD.to(new_DD)).float().cpu()


def moments_cost(model: nn.Module) -> Cost:
    """Of the moments and the projectors of all adapted layers."""
    squares = sum(int(layer.in_features) ** 2 for layer in lora_layers(model).values())
    return Cost("second moments of inputs, and projectors (float32)", 2 * 4 * squares)


def held_share(projectors: Mapping[str, Tensor]) -> float:
    """Mean over layers of the share of input directions that are held."""
    return sum(float(p.trace()) / len(p) for p in projectors.values()) / max(len(projectors), 1)
