"""Long texts of the page, compressed: plotly.js is 4.8 MB as it stands, and 1.8 MB packed."""

from __future__ import annotations

import base64
import functools
import gzip
from typing import NamedTuple


class Packed(NamedTuple):
    """A text as `unpacked` of report.js reads it: gzip in base 85, with a comma in place of "<"."""

    text: str
    size: int  # of the gzip, in bytes


def pack(text: str) -> Packed:
    """Compress a text for a ``<script type="text/plain">``, where no "<" may stand."""
    data = gzip.compress(text.encode("utf-8"), mtime=0)
    return Packed(base64.b85encode(data, pad=True).decode("ascii").replace("<", ","), len(data))


def unpack(text: str, size: int) -> str:
    """What `pack` was given."""
    data = base64.b85decode(text.strip().replace(",", "<"))
    return gzip.decompress(data[:size]).decode("utf-8")


@functools.cache
def plotly() -> Packed:
    """The library that draws the figures."""
    from plotly.offline import get_plotlyjs

    return pack(get_plotlyjs())
