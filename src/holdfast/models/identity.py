"""What tells one model from another: digests of all bytes, fingerprints of a few values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from holdfast import world
from holdfast.names import canonical_name

_SAMPLED = 64  # values of each parameter in its fingerprint


def digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of all parameters."""
    h = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: canonical_name(item[0])):
        h.update(f"{canonical_name(name)}{tuple(parameter.shape)}{parameter.dtype}".encode())
        for part in _plain(parameter.detach()):
            flat = part.cpu().contiguous().reshape(-1)
            if flat.numel():  # an empty tensor can't be viewed as bytes
                h.update(flat.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor itself, or those that a packed one (torchao's, quanto's) is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def sampled(tensor: Tensor) -> Tensor:
    """A few values of a tensor, evenly spaced, on the CPU."""
    flat = tensor.reshape(-1)
    places = torch.linspace(0, max(0, flat.numel() - 1), min(flat.numel(), _SAMPLED), dtype=torch.float64)
    return flat[places.long().to(flat.device)].cpu().contiguous()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Canonical name to eight hex digits of a few values of each parameter.

    They are the same in float64, float32 and bfloat16. Weights in float16 have none: it rounds otherwise, and
    has no place for the largest and smallest values. Cheap, to tell one model from another; `digest` looks at
    every byte.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16:
            continue
        values = sampled(next(_plain(world.whole(parameter).detach()))).to(torch.bfloat16)
        h = hashlib.sha256(repr(tuple(world.shape(parameter))).encode())
        if values.numel():
            h.update(values.view(torch.uint8).numpy().tobytes())
        found[canonical_name(name)] = h.hexdigest()[:8]
    return found
