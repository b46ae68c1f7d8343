"""Decomposed: linear maps of which only the lesser singular directions are trained, by PEFT's OSF."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.errors import ConfigError
from holdfast.hold.attach import Handle, hook, unwrap
from holdfast.hold.cost import Cost, Estimate, trained_numbers
from holdfast.models import linear_modules
from holdfast.models.adapters import is_adapted
from holdfast.names import layer_of

_ADAPTER = "default"


def trained_maps(model: nn.Module) -> dict[str, Any]:
    """Name and module of the linear maps in transformer blocks whose weight is trained."""
    return {
        name: module
        for name, module in linear_modules(model)
        if layer_of(f"{name}.") is not None and module.weight.requires_grad
    }


def check_decomposable(model: Any) -> None:
    """Raise a `ConfigError` if OSF is not defined for this model."""
    if is_adapted(model):
        raise ConfigError("strategy: osf trains whole weights, not adapters; leave out model.lora.")
    maps = trained_maps(model)
    other = next((name for name, module in maps.items() if not isinstance(module, nn.Linear)), None)
    if other is not None or not maps:
        what = f"{other} is transformers' Conv1D (as in GPT-2)" if maps else "no linear map is trained"
        raise ConfigError(
            f"strategy: osf is not defined here: {what}, and PEFT's OSF decomposes torch.nn.Linear only. "
            "Choose another strategy or another model."
        )


def preserved(weight: Tensor, share: float) -> int:
    """How many of a map's singular values are preserved: this share, rounded down, at least 1, never all."""
    size = min(weight.shape)
    return min(max(int(size * share), 1), size - 1)


def lower_size(model: nn.Module, share: float) -> int:
    """How many numbers U_l, S_l and V_l of all trained maps have together."""
    weights = [module.weight for module in trained_maps(model).values()]
    return sum((min(w.shape) - preserved(w, share)) * (sum(w.shape) + 1) for w in weights)


def decomposed_estimate(model: nn.Module, shares: Sequence[float]) -> Estimate:
    """Of training by stages that preserve these shares; a stage that preserves nothing is a plain one."""
    decomposing, trained = [share for share in shares if share], None
    if shares[0]:
        maps = sum(module.weight.numel() for module in trained_maps(model).values())
        trained = trained_numbers(model) - maps + lower_size(model, shares[0])
    if not decomposing:
        return Estimate(trained=trained)
    size = next(model.parameters()).element_size() * lower_size(model, min(decomposing))
    return Estimate([Cost("singular factors, and their start", 2 * size)], trained)


class Decomposed:
    """W = U_h S_h V_h + U_l S_l V_l of each trained linear map in blocks; U_l, S_l, V_l take W's place.

    The model is changed in place until `merge`. PEFT projects the gradients of U_l and V_l off the columns of
    U_h and the rows of V_h. What else was trained before is trained as before.

    Parameters
    ----------
    model : nn.Module
        A transformers model without adapters, its maps `torch.nn.Linear`.
    share : callable
        Of a map's name the share of its singular values, the largest, that belong to the part h, see
        `preserved`.

    Notes
    -----
    Memory beside the model, in its dtype: the factors l (with their gradients and optimizer state instead of
    W's), their first values, and U_h or V_h of the longer side of a map that is not square.
    """

    def __init__(self, model: nn.Module, share: Callable[[str], float]) -> None:
        from peft.tuners.osf import OSFConfig, OSFModel

        maps = trained_maps(model)
        ranks: dict[str, Any] = {
            f"^{re.escape(name)}$": preserved(module.weight, share(name)) for name, module in maps.items()
        }
        self._trained = [p for p in model.parameters() if p.requires_grad]
        config = OSFConfig(target_modules="|".join(map(re.escape, maps)), rank_pattern=ranks)
        self._tuner: Any = OSFModel(model, config, _ADAPTER)  # freezes all but the factors
        decomposed = {id(module.weight) for module in maps.values()}
        for parameter in self._trained:
            parameter.requires_grad_(id(parameter) not in decomposed)
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in maps}

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Project U_l and V_l themselves, too, after every step, until the handle is removed.

        Under Adam a step is not orthogonal though its gradient is.
        """
        factors = [
            layer.osf_svd_params[_ADAPTER][name]
            for layer in self.layers.values()
            for name in ("U_low", "V_low")
        ]

        @torch.enable_grad()
        def project() -> None:
            for factor in factors:
                if not factor.requires_grad:  # frozen since: it stays as it was projected
                    continue
                # PEFT's gradient hook is the projection: here it gets the factor as if it were the gradient
                (inside,) = torch.autograd.grad(factor.view_as(factor), factor, factor.detach())
                factor.data.copy_(inside)

        return hook(unwrap(optimizer), after=project)

    def buffers(self) -> dict[str, Tensor]:
        """U_h or V_h and the first values of the factors, live. PEFT leaves them out of checkpoints.

        A resumed training needs the same ones, and a second SVD may differ in its last bits.
        """
        return {f"{n}.{key}": b for n, layer in self.layers.items() for key, b in layer.named_buffers()}

    def merge(self) -> None:
        """W ← W + U_l S_l V_l − what it was at first; then the model is a plain one, trained as before.

        Of 16-bit weights this is done in float32, one map at a time, and rounded once: the change is a small
        difference of two products.
        """
        for layer in self.layers.values():
            dtype = layer.weight.dtype
            layer.to(torch.promote_types(dtype, torch.float32))
            layer.merge()
            layer.to(dtype)
        self._tuner.unload()  # takes the wrappers off; without the merge it would undo the training
        for parameter in self._trained:
            parameter.requires_grad_(True)
