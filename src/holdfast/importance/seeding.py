"""Seeds and samples that depend on nothing but what they are for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def seed_for(name: str, seed: int) -> int:
    """A seed for one named tensor, independent of the order and number of the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def sample(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` of the rows without repetition, in their own order; all of them if there are fewer."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]
