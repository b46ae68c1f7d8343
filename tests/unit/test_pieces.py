"""Flat pieces of a weight and the rows that begin in them, for any shape and number of processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast import world
from holdfast.hold.zero import Part
from holdfast.pieces import Piece

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3)


@given(shape=SHAPES, size=st.integers(1, 9))
def test_each_value_is_in_one_piece_and_each_row_has_one_owner(shape: list[int], size: int) -> None:
    pieces = [Piece.of(shape, rank, size) for rank in range(size)]
    values = [value for piece in pieces for value in range(piece.start, piece.end)]
    assert values == list(range(math.prod(shape)))
    rows = [row for piece in pieces for row in range(*piece.rows)]
    assert rows == list(range(shape[0]))
    for piece in pieces:
        begins = [row for row in range(shape[0]) if piece.start <= row * piece.row < piece.end]
        assert begins == list(range(*piece.rows))
    assert sum(piece.head for piece in pieces) == sum(piece.lacking for piece in pieces)


@given(shape=SHAPES, size=st.integers(1, 9), seed=st.integers(0, 99))
def test_rows_are_whole_on_their_owner_and_go_back_where_they_came_from(
    shape: list[int], size: int, seed: int
) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    length = -(-whole.numel() // size)
    flat = torch.cat([whole.flatten(), torch.zeros(length * size - whole.numel())]).view(size, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "_size", size)
        parts = []
        for rank in range(size):
            patch.setattr(world, "_rank", rank)
            parts.append(Part(whole.shape, lambda rank=rank: flat[rank]))
        heads = torch.stack([part.head(part.weight) for part in parts])
        for rank, part in enumerate(parts):
            patch.setattr(world, "_rank", rank)
            part.fill(part.rows, part.weight, heads)
        assert torch.equal(torch.cat([part.rows for part in parts]), whole)
        for part in parts:
            part.rows.mul_(2)
        tails = torch.stack([part.tail(part.rows) for part in parts])
        for rank, part in enumerate(parts):
            patch.setattr(world, "_rank", rank)
            part.empty(part.rows, part.weight, tails)
    assert torch.equal(flat.flatten()[: whole.numel()].view(shape), 2 * whole)
