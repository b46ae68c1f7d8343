"""How exactly float32 products are made on a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_for(dtypes: Collection[torch.dtype]) -> Iterator[None]:
    """Inside the block, float32 products are as exact as these types deserve.

    Where all are 16-bit, a GPU rounds the factors to TF32 (10 bits; bfloat16 has 7 and float16 10), at
    several times the speed; sums stay float32. Otherwise, and on a CPU, nothing changes.
    """
    if not torch.cuda.is_available() or any(dtype.itemsize > 2 for dtype in dtypes):
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
