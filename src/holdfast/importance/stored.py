"""Importance on disk: tensors in float32, in half of it, or as a byte a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Width = Literal["float32", "bfloat16", "int8"]
BLOCK = 64  # values that share a scale
SCALES = ":scales"  # behind the name of a tensor of bytes: a float32 a block


def packed(tensors: Mapping[str, Tensor], width: Width) -> dict[str, Tensor]:
    """As they go into a file.

    bfloat16 keeps 8 significant bits: a relative error below 2^-8. int8 keeps of each 64 values that follow
    one another the largest size, and every value as a 127th part of it: an absolute error of at most a 254th
    part of the largest, in 1.06 bytes a value. Below 1e-38, where
    float32 has no normal numbers, it may be more.
    """
    if width != "int8":
        return {name: tensor.to(getattr(torch, width)) for name, tensor in tensors.items()}
    found = {}
    for name, tensor in tensors.items():
        blocks_NB = _blocks(tensor.float())
        scales_N = blocks_NB.abs().amax(1) / 127
        steps_NB = blocks_NB / scales_N.where(scales_N > 0, 1.0)[:, None]
        codes = steps_NB.round().clamp(-127, 127).to(torch.int8)
        found[name] = codes.flatten()[: tensor.numel()].view(tensor.shape)
        found[name + SCALES] = scales_N
    return found


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `packed` was given, in float32, up to its error."""
    return {n: _unpacked(t, tensors.get(n + SCALES)) for n, t in tensors.items() if not n.endswith(SCALES)}


class Unpacking:
    """A file of tensors as safetensors opens it, each of them unpacked when asked for."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._names = set(opened.keys())

    def keys(self) -> list[str]:
        """The tensors' names."""
        return sorted(name for name in self._names if not name.endswith(SCALES))

    def get_tensor(self, name: str) -> Tensor:
        """One of them, float32."""
        scales = name + SCALES
        return _unpacked(
            self._opened.get_tensor(name), self._opened.get_tensor(scales) if scales in self._names else None
        )


def _unpacked(tensor: Tensor, scales_N: Tensor | None) -> Tensor:
    if scales_N is None:
        return tensor.float()
    values_NB = _blocks(tensor.float()) * scales_N[:, None]
    return values_NB.flatten()[: tensor.numel()].view(tensor.shape)


def _blocks(tensor: Tensor) -> Tensor:
    """(N, 64), the last one filled up with zeros."""
    flat = tensor.flatten()
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
