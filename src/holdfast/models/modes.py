"""The states that a model is in: evaluating, under autocast, recomputing, and whether it can be rated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from holdfast import world
from holdfast.errors import ModelError
from holdfast.models.adapters import stay_differentiable

_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def recomputes_reentrantly(model: nn.Module) -> bool:
    """Whether activations are made anew in the backward pass by torch's reentrant checkpointing.

    A block then runs without a graph first. Its second run makes one, but what has left the block by a hook
    has none, and what a hook brings in is gone through backward once for each block.
    """
    return any(
        getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        is not False
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )


def unprepare(model: nn.Module) -> None:
    """Take off what accelerate leaves on a model: autocast, and the mark that leaves it out the next time."""
    model.__dict__.pop("_is_accelerate_prepared", None)
    own = model.__dict__.pop("_original_forward", None)
    if own is not None:
        del model.__dict__["forward"]
        if model.forward != own:  # somebody had put another on it before
            model.forward = own


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The same for a block, and no autocast around it either."""
    kept = {name: value for name, value in model.__dict__.items() if name in _PREPARED}
    unprepare(model)
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        model.__dict__.update(kept)


def require_rateable(model: nn.Module) -> None:
    """Refuse to rate a model of which each process has a part alone, or that passes no gradient.

    Raises
    ------
    ModelError
    """
    stay_differentiable(model)
    cut = next((name for name, p in model.named_parameters() if world.is_sharded(p)), None)
    if cut is not None:
        raise ModelError(
            f"importance: {type(model).__name__} is cut up over the processes ('{cut}' is in parts: FSDP2 or "
            "DeepSpeed ZeRO-3). Rate a whole model: before the trainer is made, and with ZeRO-3 before its "
            "TrainingArguments, or load it again in a process of its own (`holdfast attribute`)."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; behind it each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def onto_gpu(model: nn.Module) -> None:
    """Put a model on the GPU, where there is one; one that was quantised there is, and can't be moved."""
    if torch.cuda.is_available() and next(model.parameters()).device.type != "cuda":
        model.cuda()
