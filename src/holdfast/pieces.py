"""How a weight is cut into flat pieces, one a process, and whose each row is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Which values of a flattened weight a process has, and which rows are its own: those that begin there.

    Attributes
    ----------
    start, end : int
        Of the values; none where both are equal.
    row : int
        Values a row.
    """

    start: int
    end: int
    row: int

    @classmethod
    def between(cls, shape: Sequence[int], start: int, end: int) -> Piece:
        """The values from `start` to `end`, as far as there are any."""
        numel = math.prod(shape)
        first, behind = (min(max(place, 0), numel) for place in (start, end))
        return cls(first, behind, max(math.prod(shape[1:]), 1))

    @classmethod
    def of(cls, shape: Sequence[int], rank: int, size: int) -> Piece:
        """The piece of one process of `size`, where all are equal."""
        length = -(-math.prod(shape) // size)
        return cls.between(shape, rank * length, (rank + 1) * length)

    @property
    def length(self) -> int:
        """How many values it has."""
        return self.end - self.start

    @property
    def rows(self) -> tuple[int, int]:
        """First own row, and the one after the last."""
        return -(-self.start // self.row), -(-self.end // self.row)

    @property
    def head(self) -> int:
        """How many of its values end a row that began in an earlier piece."""
        return min(self.rows[0] * self.row, self.end) - self.start

    @property
    def body(self) -> int:
        """How many of its values are of its own rows: those behind the head."""
        return self.length - self.head

    @property
    def lacking(self) -> int:
        """How many values of its last own row lie in later pieces."""
        first, behind = self.rows
        return behind * self.row - self.end if behind > first else 0
