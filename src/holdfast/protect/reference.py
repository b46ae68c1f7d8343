"""The weights that a protection pulls back to."""

from __future__ import annotations

from torch import Tensor, nn

from holdfast.importance.prior import ImportancePrior, parameters_by_name


def weights_of(model: nn.Module, prior: ImportancePrior) -> dict[str, Tensor]:
    """Copies of the weights that a prior rates, as they are now, by canonical name."""
    named = parameters_by_name(model)
    return {name: named[name].detach().clone() for name in prior.tensors}
