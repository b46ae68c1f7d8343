"""What a figure shows, in words, for whoever doesn't see it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from holdfast.quantities import number

_MOST = 12  # lines or columns that are read out


def describe(figure: dict[str, Any]) -> str:
    """Some sentences made from a figure's data: each line by its ends, a table by its last row."""
    parts = []
    for trace in figure["data"]:
        if trace["type"] == "heatmap":
            parts.append(_table(trace, figure["layout"]))
        elif trace["type"] == "bar":
            parts.append(_bars(trace))
        elif trace.get("name") and trace.get("mode") != "text":
            parts.append(_line(trace))
    kept = list(dict.fromkeys(part for part in parts if part))
    more = f" And {len(kept) - _MOST} more." if len(kept) > _MOST else ""
    return f"{'. '.join(kept[:_MOST])}.{more}" if kept else ""


def _line(trace: dict[str, Any]) -> str:
    name = _plain(trace["name"])
    points = [(x, y) for x, y in zip(trace["x"], trace["y"], strict=False) if x is not None and y is not None]
    if not points:
        return ""
    (x, first), (_, last) = points[0], points[-1]
    if len(points) == 1:  # a place on the axis of accuracy
        return f"{name}: {_said(x)}"
    if "lines" not in trace.get("mode", "lines"):
        low, high = min(y for _, y in points), max(y for _, y in points)
        return f"{name}: {len(points)} points from {_said(low)} to {_said(high)}"
    return f"{name}: {_said(first)} at first, {_said(last)} at last"


def _table(trace: dict[str, Any], layout: dict[str, Any]) -> str:
    rows = trace["z"]
    values = [value for row in rows for value in row if value is not None]
    if not values:
        return ""
    said = f"{len(rows)} rows of {len(rows[0])} cells, from {_said(min(values))} to {_said(max(values))}"
    columns = layout.get("xaxis", {}).get("ticktext", ())
    names = layout.get("yaxis", {}).get("ticktext", ())
    if len(columns) != len(rows[-1]) or len(names) != len(rows) or len(columns) > _MOST:
        return said
    cells = zip(columns, rows[-1], strict=True)
    last = ", ".join(f"{_plain(name)} {_said(value)}" for name, value in cells if value is not None)
    return f"{said}. Last row, {_plain(names[-1])}: {last}"


def _bars(trace: dict[str, Any]) -> str:
    heights: Iterable[float] = [y or 0.0 for y in trace["y"]]
    highest, place = max(zip(heights, trace["x"], strict=False), default=(0.0, ""))
    return f"{len(trace['y'])} bars, the highest, {_said(highest)}, at {_said(place)}"


def _said(value: Any) -> str:
    if not isinstance(value, int | float):
        return _plain(str(value))
    return number(value, 1) if abs(value) >= 1 or value == 0 else f"{value:.2g}"


def _plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", text)).strip()
