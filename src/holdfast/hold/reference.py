"""The weights as they are before a task: what a protection pulls back to, or a fusion averages with."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from holdfast.importance.prior import parameters_by_name


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the weights of these canonical names (such as a prior's ``tensors``), as they are now."""
    named = parameters_by_name(model)
    return {name: named[name].detach().clone() for name in names}
