"""A basis of which K directions are given: orthonormal, these first, and its products those of the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inputs_hold import ETA, NAMES, Net, grad, gradient, moments, oriented
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.hold import Anchor
from holdfast.hold.basis import Leading, Whole, basis_of
from holdfast.importance.prior import ImportancePrior

CPU = torch.device("cpu")


def drawn(size: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q


@given(st.integers(2, 12), st.data(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_products_are_those_of_an_orthonormal_matrix_with_the_directions_first(
    size: int, data: st.DataObject, seed: int
) -> None:
    rank = data.draw(st.integers(1, size - 1))
    given_IK = drawn(size, rank, seed)
    basis = basis_of(given_IK, device=CPU, dtype=torch.float64)
    assert isinstance(basis, Leading)
    one_II = torch.eye(size, dtype=torch.float64)
    u_II = basis.into(one_II)
    torch.testing.assert_close(u_II.T @ u_II, one_II)
    torch.testing.assert_close((u_II[:, :rank] * given_IK).sum(0).abs(), torch.ones(rank).double())
    m_OI, add_OI = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(basis.into(m_OI), m_OI @ u_II)
    torch.testing.assert_close(basis.back(m_OI), m_OI @ u_II.T)
    torch.testing.assert_close(basis.back(m_OI, add_OI), add_OI + m_OI @ u_II.T)
    out_OI = torch.empty_like(m_OI)
    assert basis.back(m_OI, add_OI, out=out_OI) is out_OI
    torch.testing.assert_close(out_OI, add_OI + m_OI @ u_II.T)


def test_directions_along_axes_give_a_basis_too() -> None:
    """No reflection is needed, so its factor is 0 and the inverse's diagonal infinite."""
    basis = basis_of(torch.eye(5, dtype=torch.float64)[:, [0, 3]], device=CPU, dtype=torch.float64)
    u_II = basis.into(torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(u_II.T @ u_II, torch.eye(5, dtype=torch.float64))
    assert u_II[:, :2].abs().tolist() == torch.eye(5)[:, [0, 3]].tolist()


def test_all_directions_are_the_matrix_itself() -> None:
    u_II = drawn(4, 4, 0)
    assert isinstance(basis_of(u_II, device=CPU, dtype=torch.float64), Whole)


@pytest.mark.parametrize("coordinates", ["inputs", "weights"])
def test_held_by_rank_moves_as_the_spectrum_with_the_others_mean_says(coordinates: Any) -> None:
    """Under gradient descent, whose steps don't depend on coordinates: Δ ← Δ U diag(1 − ηλc) Uᵀ."""
    prior, model = moments(), Net()
    weights = dict(model.named_parameters())
    start = {name: weights[name].detach().clone() for name in NAMES}
    optimizer = torch.optim.SGD(model.parameters(), lr=ETA)
    hold = Anchor(prior.leading(2), strength=2.0, coordinates=coordinates)
    handle = hold.attach(model, optimizer)
    change = {name: torch.zeros_like(start[name]) for name in NAMES}
    moved = whole = 0.0
    for step in range(3):
        optimizer.zero_grad()
        gradient(model, seed=step)
        for name in NAMES:
            c_II = prior.tensors[name].double()
            c_I, u_II = torch.linalg.eigh((c_II * len(c_II) / c_II.trace()).float().double())
            c_I[:-2] = c_I[:-2].mean()
            new_OI = oriented(change[name] - ETA * grad(weights[name]), name)
            new_OI = new_OI @ u_II @ torch.diag(1 - (ETA * 2.0 * c_I).clamp(max=1)) @ u_II.T
            change[name] = oriented(new_OI, name)
            if step == 2:
                moved += float((new_OI @ u_II).square().sum(0) @ c_I)
                whole += float((oriented(start[name], name) @ u_II).square().sum(0) @ c_I)
        optimizer.step()
    for name in NAMES:
        got = weights[name].detach() - start[name]
        torch.testing.assert_close(got, change[name], rtol=1e-5, atol=1e-7)
    assert handle.drift().total == pytest.approx(moved / whole, rel=1e-5)


def test_a_rank_of_a_prior_by_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="`rank` counts directions of a map's inputs"):
        ImportancePrior({"w": torch.ones(2, 2)}).leading(1)
