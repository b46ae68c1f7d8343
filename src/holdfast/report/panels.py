"""What the sections of the page are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_WIDTH, _GAP = 1116, 16  # of the page's column, as in style.css


@dataclass
class Panel:
    """A place for a figure: its key, a title, and the width it needs before it scrolls."""

    figure: str
    title: str = ""
    min_width: int = 0
    note: str = ""
    run: int | None = None  # index of the run, or of the method in `legend`, for the colour chip
    prefix: str = ""  # with `choices`: the key of each figure without its choice
    choices: list[tuple[str, str]] = field(default_factory=list)


def column(panels: Sequence[Panel], least: int) -> int:
    """Column width (px) of a grid whose rows are equally full: 5 panels as 3 + 2, not as 4 + 1."""
    needed = max(least, *(panel.min_width + 34 for panel in panels))
    fitting = max(1, (_WIDTH + _GAP) // (needed + _GAP))
    across = math.ceil(len(panels) / math.ceil(len(panels) / fitting))
    return (_WIDTH + _GAP) // max(across, min(2, fitting)) - _GAP
