"""The weights as they are before a task: what a protection pulls back to, or a fusion averages with."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from holdfast import world
from holdfast.importance.prior import parameters_by_name


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the weights of these canonical names (such as a prior's ``tensors``), as they are now.

    Under ZeRO-3 they are whole, and on the CPU: a device has room for its pieces.
    """
    named = parameters_by_name(model)
    return {
        name: world.whole(p).cpu() if world.in_pieces(p := named[name]) else p.detach().clone()
        for name in names
    }
