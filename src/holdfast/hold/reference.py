"""The weights as they are before a task: what a protection pulls back to, or a fusion averages with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.hold.attach import Chunk
from holdfast.hold.kept import Kept, digest
from holdfast.importance.prior import parameters_by_name
from holdfast.models.identity import sampled


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the weights of these canonical names (such as a prior's ``tensors``), as they are now.

    Under ZeRO-3 they are whole, and on the CPU: a device has room for its pieces.
    """
    named = parameters_by_name(model)
    return {
        name: world.whole(p).cpu() if world.in_pieces(p := named[name]) else p.detach().clone()
        for name in names
    }


def watch_reference(
    kept: Kept, chunks: Sequence[Chunk], references: Sequence[Sequence[Tensor]]
) -> Callable[[], None]:
    """Warn where an optimizer's state is of a training that was held to other weights than these.

    A script that goes on from a checkpoint and gives no `reference` would hold old outputs as the training
    until then has left them. A mark of the weights (`references`, those of each chunk) goes into the state;
    one that is there is looked at now, and whenever a state is loaded. Parts of weights leave none: other
    processes have other parts.

    Returns
    -------
    callable
        Ends it.
    """
    if not all(chunk.is_whole for chunk in chunks):
        return lambda: None
    optimizer, key = kept.optimizer, kept.key
    names = digest(repr([name for chunk in chunks for name in chunk.names]).encode())
    held_to = (weight for reference in references for weight in reference)
    values = digest(b"".join(sampled(weight).view(torch.uint8).numpy().tobytes() for weight in held_to))
    mark = names, values

    def look(_: Optimizer) -> None:
        group = optimizer.param_groups[0]
        before = group.get(key, mark)
        if before[0] == names and before[1] != values:  # with more or fewer weights they can't be compared
            warnings.warn(
                f"{kept.whose}: the optimizer's state is of a training that was held to other weights than "
                "this one is. Where it goes on from a checkpoint give `reference=`, the weights that it "
                "began with: without, old outputs are held as they are now, and their movement counts from "
                "here.",
                stacklevel=2,
            )
        group[key] = mark

    look(optimizer)
    loaded = optimizer.register_load_state_dict_post_hook(look)

    def end() -> None:
        loaded.remove()
        optimizer.param_groups[0].pop(key, None)

    return end
