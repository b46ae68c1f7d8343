"""Controls: the same amount of protection, given to other weights."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal, get_args

import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.importance.moments import alike, told_apart, turned
from holdfast.importance.prior import ImportancePrior
from holdfast.importance.seeding import seed_for
from holdfast.names import block_path

Control = Literal["none", "permuted", "tensor-mean", "layer-mean"]
CONTROLS: dict[Control, str] = {
    "none": "nothing",
    "permuted": "which weight of a tensor matters (of `inputs`: which direction of a map)",
    "tensor-mean": "any difference between the weights of a tensor",
    "layer-mean": "any difference between the weights of a transformer block",
}


def apply_control(prior: ImportancePrior, control: Control = "none", seed: int = 0) -> ImportancePrior:
    """Replace a prior by its control, which tells what about the importance matters.

    Parameters
    ----------
    control : {"none", "permuted", "tensor-mean", "layer-mean"}
        ``permuted``: the same values, shuffled within each tensor; if it does as well as the prior itself,
        then only how protection is spread over tensors mattered, not which weight. ``tensor-mean`` and
        ``layer-mean``: each weight gets the mean of its tensor, or of its transformer block (tensors
        outside a block: their own mean); negative values count as 0 in the mean, as they protect nothing.
        Of the kind ``inputs``: ``permuted`` is the same spectrum on random directions (a random rotation of
        each map's inputs), the means are those of eigenvalues, the same in all directions. The control
        ``shuffled-relevance``, other tokens' inputs, is an option of the importance.
    seed : int
        Of the permutation. It depends on the tensor's name too, not on which other tensors there are.

    Returns
    -------
    ImportancePrior
        New tensors (or the same prior for ``none``); the metadata records the control.

    Raises
    ------
    ConfigError
        No such control.
    """
    if control not in get_args(Control):
        raise ConfigError(f"control: got {control!r}. Allowed: {', '.join(get_args(Control))}.")
    if control == "none":
        return prior
    if prior.kind == "inputs":
        tensors = _of_moments(prior.mean_normalised().tensors, control, seed)
    elif control == "permuted":
        tensors = {name: _shuffled(tensor, name, seed) for name, tensor in prior.tensors.items()}
    else:
        groups: dict[str, list[str]] = defaultdict(list)
        for name in prior.tensors:
            groups[block_path(name) if control == "layer-mean" else name].append(name)
        tensors = {}
        for names in groups.values():
            total = sum(float(prior.tensors[n].clamp(min=0).sum(dtype=torch.float64)) for n in names)
            mean = total / max(sum(prior.tensors[n].numel() for n in names), 1)
            tensors.update({n: torch.full_like(prior.tensors[n], mean) for n in names})
        tensors = {name: tensors[name] for name in prior.tensors}  # the model's order
    return ImportancePrior(tensors, {**prior.meta, "control": control, "control_seed": seed})


def _of_moments(moments: dict[str, Tensor], control: Control, seed: int) -> dict[str, Tensor]:
    """Controls of moments that have mean eigenvalue 1 each, so that the mean of any of them is 1."""
    if control == "permuted":
        return {name: _rotated(c, name, seed) for name, c in moments.items()}
    return {name: alike(c) for name, c in moments.items()}


def _rotated(c: Tensor, name: str, seed: int) -> Tensor:
    """The same eigenvalues on the columns of a random rotation."""
    generator = torch.Generator().manual_seed(seed_for(name, seed))
    shape = c.shape[1], told_apart(c)
    q_IK, r_KK = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return turned(c, q_IK * r_KK.diagonal().sign())  # the signs: else not uniform over rotations


def _shuffled(tensor: Tensor, name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(name, seed))
    order = torch.randperm(tensor.numel(), generator=generator)
    return tensor.flatten()[order].view_as(tensor)
