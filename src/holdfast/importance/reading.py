"""A prior read: its largest values, its blocks, as a table, as a figure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.importance.moments import diagonal, shape_of
from holdfast.names import block_of, order_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Top:
    """One of the most important places.

    Attributes
    ----------
    name : str
        Of the parameter.
    index : tuple of int
        Of the weight in it; of the kind ``inputs`` the number of the input.
    value : float
    """

    name: str
    index: tuple[int, ...]
    value: float


def block_name(name: str) -> str:
    """A parameter's transformer block, such as ``3`` or ``decoder 3``; "" outside of them."""
    block = block_of(name)
    return "" if block is None else f"{block[0]} {block[1]}".strip()


def values_of(tensor: Tensor, inputs: bool) -> Tensor:
    """What is compared of a tensor: all of it; of a second moment C the diagonal (I,)."""
    return diagonal(tensor) if inputs else tensor


def largest(tensors: Mapping[str, Tensor], inputs: bool, count: int) -> list[Top]:
    """The `count` largest values of all tensors, largest first; equal ones in the tensors' order."""
    if not hasattr(count, "__index__") or count < 1:
        raise ConfigError(f"top: got {count}. Give how many there shall be, a whole number of at least 1.")
    found: list[tuple[float, int, Top]] = []
    for name, tensor in tensors.items():
        values = values_of(tensor, inputs)
        top = values.flatten().topk(min(count, values.numel()))
        for value, flat in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), values.shape))
            found.append((value, -len(found), Top(name, index, value)))
    return [top for _, _, top in heapq.nlargest(count, found)]


def block_means(tensors: Mapping[str, Tensor], inputs: bool) -> dict[str, float]:
    """Mean value of each transformer block from the input up; then what stands outside, by its own name.

    What has no values has no mean, and is left out.
    """
    sums: dict[str, tuple[float, int]] = {}
    places: dict[str, tuple[Any, ...]] = {}
    for name, tensor in tensors.items():
        values = values_of(tensor, inputs)
        block = block_of(name)
        key = block_name(name) or name
        places[key] = (1, name) if block is None else (0, *order_of(block))
        total, count = sums.get(key, (0.0, 0))
        sums[key] = (total + float(values.sum(dtype=torch.float64)), count + values.numel())
    ordered = sorted(sums, key=places.__getitem__)
    return {key: sums[key][0] / sums[key][1] for key in ordered if sums[key][1]}


def table(tensors: Mapping[str, Tensor], inputs: bool) -> list[dict[str, Any]]:
    """A row a tensor: name, block, shape, how many values, their mean, largest (None of none) and sum."""
    rows = []
    for name, tensor in tensors.items():
        values = values_of(tensor, inputs)
        rows.append(
            {
                "name": name,
                "block": block_name(name),
                "shape": "x".join(map(str, shape_of(tensor) if inputs else tensor.shape)),
                "values": values.numel(),
                "mean": float(values.mean(dtype=torch.float64)) if values.numel() else None,
                "max": float(values.max()) if values.numel() else None,
                "sum": float(values.sum(dtype=torch.float64)),
            }
        )
    return rows


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A table as a data frame.

    Raises
    ------
    ConfigError
        pandas isn't installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError(
            "to_pandas: pandas isn't installed. `pip install pandas`, or use prior.table()."
        ) from error
    return pd.DataFrame(rows)


def bars(means: Mapping[str, float], title: str) -> go.Figure:
    """Mean importance of each block as bars."""
    import plotly.graph_objects as go

    figure = go.Figure(go.Bar(x=list(means), y=list(means.values())))
    figure.update_layout(title=title, xaxis_title="block", yaxis_title="mean importance")
    figure.update_xaxes(type="category")
    return figure
