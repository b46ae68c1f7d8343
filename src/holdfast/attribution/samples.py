"""Which sample each row of an activation is of, where a model picks rows (a token for each chosen expert)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.attribution.maps import WeightMaps
from holdfast.attribution.trace import tensors_in, tracked

_ROWS = "_holdfast_rows"
# operations that change which rows there are; applied to the rows' samples where rows are dimension 0
_MOVING = frozenset({"split", "split_with_sizes", "chunk", "tensor_split", "cat", "concat"})
_PICKING = frozenset({"__getitem__", "index_select"})
_SHUFFLING = frozenset({"flip", "roll", "sort", "topk", "transpose", "permute", "T", "mT", "t", "repeat"})


def rows_of(x: Tensor) -> Tensor | None:
    """The sample of each row of `x`, if its rows were picked from those of a batch."""
    return getattr(x, _ROWS, None)


def follow(
    maps: WeightMaps,
    name: str,
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
) -> None:
    """Note the samples of the rows of an operation's output.

    Rows keep their samples as long as an operation keeps their number. Where that is not what it means, the
    comparison of a sample in a batch with the sample alone finds out.
    """
    if maps.samples <= 1:
        return
    if name in _PICKING:
        _pick(maps, args, kwargs, out)
        return
    known = [t for t in tensors_in(*args, *kwargs.values()) if tracked(t) and rows_of(t) is not None]
    if not known or name in _SHUFFLING:
        return
    rows: Any = rows_of(known[0])
    if name in _MOVING:
        _move(func, args, kwargs, out)
    elif isinstance(out, Tensor):
        _give(out, rows)
    elif isinstance(out, tuple | list):
        for tensor in out:
            if isinstance(tensor, Tensor):
                _give(tensor, rows)


def _give(out: Tensor, rows: Tensor) -> None:
    if out.requires_grad and out.dim() and len(out) == len(rows):
        setattr(out, _ROWS, rows)


def _pick(maps: WeightMaps, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    x = args[0]
    index = kwargs.get("index", args[-1])
    first = index[0] if isinstance(index, tuple) and index else index
    if not tracked(x) or not isinstance(out, Tensor):
        return
    rows = rows_of(x)
    if first is Ellipsis or first == slice(None) if not isinstance(first, Tensor) else False:
        if rows is not None:
            _give(out, rows)
        return
    dim = kwargs.get("dim", args[1] if len(args) == 3 else 0)
    if isinstance(first, Tensor) and dim == 0:
        if rows is None and x.dim() == 2 and len(x) in maps.rows:
            rows = torch.arange(maps.samples, device=x.device).repeat_interleave(len(x) // maps.samples)
        if rows is None and first.dim() > 1 and len(x) == maps.samples:  # a mask of tokens
            rows = torch.arange(maps.samples, device=x.device)
        if rows is not None and first.dtype == torch.bool:
            _give(out, rows[first.nonzero()[:, 0]])
        elif rows is not None and first.dim() == 1:
            _give(out, rows[first])
    elif isinstance(first, slice) and rows is not None:
        _give(out, rows[first])


def _move(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    source = args[0]
    dim = kwargs.get("dim", args[-1] if isinstance(args[-1], int) and len(args) > 1 else 0)
    whole = source if isinstance(source, Tensor) else source[0]
    if dim not in (0, -whole.dim()):  # rows stay
        for tensor in [out] if isinstance(out, Tensor) else out:
            _give(tensor, rows_of(whole))  # type: ignore[arg-type]
        return
    parts = [source] if isinstance(source, Tensor) else list(source)
    rows = [rows_of(part) for part in parts]
    if any(r is None for r in rows):
        return
    moved = func(rows[0] if isinstance(source, Tensor) else rows, *args[1:], **kwargs)
    pairs = [(out, moved)] if isinstance(out, Tensor) else zip(out, moved, strict=True)
    for tensor, samples in pairs:
        _give(tensor, samples)
