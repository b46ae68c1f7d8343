"""Whether a sample's maps in a batch are those of the sample alone, from sketches of a few of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Of the difference, relative to the tensor, or to SMALL of the largest tensor where that is more. A map that
# misses a path or holds another sample's part is wrong by about its own size; rounding is far below.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-2}
SMALL = 1e-2
_PIECES = 64

Sketches = dict[str, Tensor]  # canonical name to (2, pieces + 1)


def sketch(grad: Tensor) -> Tensor:
    """Scaled sum and norm of each of some pieces of a tensor, and of what is left over, (2, pieces + 1)."""
    flat, size = grad.reshape(-1).double(), grad.numel() // _PIECES
    head, tail = flat[: size * _PIECES].view(_PIECES, size), flat[size * _PIECES :]
    sums = torch.cat([head.sum(1) / max(1, size) ** 0.5, tail.sum().view(1)])
    return torch.stack([sums, torch.cat([head.norm(dim=1), tail.norm().view(1)])])


class SketchFold:
    """A fold that keeps a sketch of every sample's map."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take maps of samples, see `holdfast.attribution.Fold`."""
        self._parts.setdefault(name, []).extend(sketch(grad) for grad in grad_S)

    def of_sample(self, number: int, names: Mapping[str, Tensor]) -> Sketches:
        """Sketches of one sample's maps; zero where nothing reached a weight."""
        return {
            name: parts[number] if (parts := self._parts.get(name)) else torch.zeros_like(sketch(weight))
            for name, weight in names.items()
        }


class TokenSketchFold(SketchFold):
    """The same from what a map's relevance is made of (`holdfast.attribution.TokenFold`)."""

    def take_tokens(
        self, name: str, x_STI: Tensor, lam_STO: Tensor, passed_ST: Tensor, real_ST: Tensor
    ) -> None:
        """Take tokens of samples."""
        lam_STO = lam_STO.to(x_STI.dtype) * real_ST[..., None]
        self.update(name, x_STI, torch.stack([lam.t() @ x for x, lam in zip(x_STI, lam_STO, strict=True)]))


def difference(found: Sketches, expected: Sketches) -> tuple[float, str]:
    """The largest relative difference, and the weight that has it."""
    largest = max((float(value.norm()) for value in expected.values()), default=0.0)
    worst, where = 0.0, ""
    for name, value in expected.items():
        scale = max(float(value.norm()), SMALL * largest, 1e-30)
        error = float((found[name] - value).norm()) / scale
        error = math.inf if math.isnan(error) else error
        if error > worst:
            worst, where = error, name
    return worst, where
