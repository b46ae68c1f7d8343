"""Flat pieces of a weight and the rows that begin in them, for any shape and number of processes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast import world
from holdfast.hold.zero import Part
from holdfast.pieces import Piece

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3)


@st.composite
def cuts(draw: Any) -> tuple[list[int], list[Piece]]:
    """A shape and its pieces: equal ones (ZeRO-3), or cut anywhere, some of them empty (ZeRO-1, ZeRO-2)."""
    shape, size = draw(SHAPES), draw(st.integers(1, 9))
    if draw(st.booleans()):
        return shape, [Piece.of(shape, rank, size) for rank in range(size)]
    places = sorted(draw(st.lists(st.integers(-20, 400), min_size=size - 1, max_size=size - 1)))
    return shape, [Piece.between(shape, *ends) for ends in pairwise([-20, *places, 400])]


@given(cuts())
def test_each_value_is_in_one_piece_and_each_row_has_one_owner(cut: tuple[list[int], list[Piece]]) -> None:
    shape, pieces = cut
    values = [value for piece in pieces for value in range(piece.start, piece.end)]
    assert values == list(range(math.prod(shape)))
    rows = [row for piece in pieces for row in range(*piece.rows)]
    assert rows == list(range(shape[0]))
    for piece in pieces:
        begins = [row for row in range(shape[0]) if piece.start <= row * piece.row < piece.end]
        assert begins == list(range(*piece.rows))
    assert sum(piece.head for piece in pieces) == sum(piece.lacking for piece in pieces)


@given(cuts(), st.integers(0, 99))
def test_rows_are_whole_on_their_owner_and_go_back_where_they_came_from(
    cut: tuple[list[int], list[Piece]], seed: int
) -> None:
    shape, pieces = cut
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = [torch.cat([whole.flatten()[p.start : p.end], torch.zeros(seed % 3)]) for p in pieces]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "_size", len(pieces))
        parts = []
        for rank in range(len(pieces)):
            patch.setattr(world, "_rank", rank)
            parts.append(Part(whole.shape, pieces, lambda rank=rank: flat[rank]))
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
    given_back = torch.cat([values[: piece.length] for values, piece in zip(flat, pieces, strict=True)])
    assert torch.equal(given_back.view(shape), 2 * whole)
