"""A's matrices of attention are those of one head: a projection is folded head by head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.importance.aggregate import TopKMean
from holdfast.models import linear_modules
from holdfast.names import canonical_name
from holdfast.resume import State

_PROJECTION = re.compile(r"(?:^|_)(?:q|k|v|qkv|kv|query|key|value|wqkv|c_attn)(?:_|$)", re.IGNORECASE)
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
Split = tuple[int, int]  # outputs of one head, and the dimension of the weight that they lie along


def splits_of(model: nn.Module) -> dict[str, Split]:
    """Canonical name of each projection to queries, keys or values, fused ones too, to how heads divide it.

    Heads of keys that several queries share, and the queries', keys' and values' parts of a fused projection,
    are matrices of their own.
    """
    modules = dict(model.named_modules())
    found: dict[str, Split] = {}
    for path, module in linear_modules(model):
        parent, _, leaf = path.rpartition(".")
        size = next((s for n in _HEAD_DIM if isinstance(s := getattr(modules[parent], n, None), int)), 0)
        dim = 0 if isinstance(module, nn.Linear) else 1
        weight: Any = module.weight
        if _PROJECTION.search(leaf) and size and weight.dim() == 2 and weight.shape[dim] % size == 0:
            found[canonical_name(f"{path}.weight")] = (size, dim)
    return found


class PerHead:
    """`TopKMean` in which each head's part of a projection is a tensor of its own (A, eqs. 9 and 10).

    Parameters
    ----------
    fold : TopKMean
    splits : mapping of str to (int, int)
        See `splits_of`; what is not in it is one tensor.
    """

    def __init__(self, fold: TopKMean, splits: Mapping[str, Split]) -> None:
        self.fold, self.splits = fold, splits
        self.bytes_per_element = fold.bytes_per_element

    def _parts(self, name: str, tensor: Tensor, lead: int = 0) -> Iterator[tuple[str, Tensor]]:
        if name not in self.splits:
            yield name, tensor
            return
        size, dim = self.splits[name]
        for number, part in enumerate(tensor.split(size, dim=dim + lead)):
            yield f"{name}[{number}]", part

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take maps of samples, see `holdfast.attribution.Fold`."""
        for (part, w), (_, grad) in zip(
            self._parts(name, weight), self._parts(name, grad_S, lead=1), strict=True
        ):
            self.fold.update(part, w, grad)

    def state(self) -> State:
        """What is folded so far; the tensors are the fold's own memory."""
        return self.fold.state()

    def load_state(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        """Take back what `state` gave; `weights` are the current ones by name."""
        parts = {part: w for name, weight in weights.items() for part, w in self._parts(name, weight)}
        self.fold.load_state(tensors, values, parts)

    def finish(self) -> None:
        """Reduce what is held to the means."""
        self.fold.finish()

    def result(self) -> dict[str, Tensor]:
        """Canonical name to importance, float32, of the weight's shape."""
        joined: dict[str, list[Tensor]] = {}
        for part, value in self.fold.result().items():
            joined.setdefault(part.split("[")[0], []).append(value)
        return {
            name: torch.cat(parts, dim=self.splits[name][1]) if name in self.splits else parts[0]
            for name, parts in joined.items()
        }
