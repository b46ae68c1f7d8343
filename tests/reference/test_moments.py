"""Leading moments against the matrices that they stand for, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inputs_moments import ROWS, double
from torch import Tensor

from holdfast.errors import PriorMismatchError
from holdfast.hold import apply_control
from holdfast.hold.drift import drift
from holdfast.importance import compute_prior
from holdfast.importance.agreement import agreement
from holdfast.importance.moments import (
    Sketch,
    cut,
    diagonal,
    energy,
    mean_eigenvalue_one,
    shape_of,
    spectrum,
    summed,
    trace,
    whole,
)
from holdfast.importance.prior import ImportancePrior
from holdfast.models import block_parameters, input_dims
from holdfast.strategies.lora.inputs import freed
from tiny_models import tiny_model

SIZE = 12


def drawn(seed: int, size: int = SIZE, decay: float = -3) -> Tensor:
    """A second moment with eigenvalues over `decay` orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    basis_II = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return ((basis_II * torch.logspace(0, decay, size, dtype=torch.float64)) @ basis_II.t()).float()


def flattened(c_II: Tensor, rank: int) -> Tensor:
    """U diag(K largest, the mean of the rest) Uᵀ, written out."""
    c_I, u_II = torch.linalg.eigh(c_II.double())
    c_I[: len(c_I) - rank] = c_I[: len(c_I) - rank].mean()
    return (u_II * c_I) @ u_II.t()


def close(got: Tensor, expected: Tensor, within: float = 1e-6) -> None:
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).abs().max() <= within * expected.double().abs().max()


@given(st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_leading_stands_for_the_spectrum_with_the_others_mean(rank: int, seed: int) -> None:
    c_II = drawn(seed)
    kept, expected = cut(c_II, rank), flattened(c_II, rank)
    assert kept.shape == (rank + 1, SIZE)
    assert shape_of(kept) == c_II.shape
    close(whole(kept), expected)
    close(diagonal(kept), expected.diagonal())
    assert trace(kept) == pytest.approx(float(expected.trace()), rel=1e-6)
    values_I, u_IK = spectrum(kept)
    close(values_I, torch.linalg.eigvalsh(expected).flip(0))
    close(u_IK.t() @ u_IK, torch.eye(rank), 1e-12)
    weight_OI = torch.randn(3, SIZE, dtype=torch.float64)
    assert energy(weight_OI, kept) == pytest.approx(float((weight_OI @ expected @ weight_OI.t()).trace()))
    close(whole(mean_eigenvalue_one(kept)), expected * SIZE / expected.trace())


@pytest.mark.parametrize("rank", [6, 12, 40])
def test_half_of_the_directions_or_more_are_the_matrix_as_it_was(rank: int) -> None:
    c_II = drawn(0)
    assert cut(c_II, rank) is c_II


@pytest.mark.parametrize(("values", "rank"), [([0, 0, 0, 0.5, 0.5, 99], 1), ([0, 0, 0, 0.5, 20, 80], 2)])
def test_auto_keeps_as_few_as_have_99_percent_of_the_trace(values: list[float], rank: int) -> None:
    assert cut(torch.diag(torch.tensor(values)), "auto").shape == (rank + 1, 6)


def test_auto_of_a_flat_spectrum_keeps_the_matrix() -> None:
    flat_II = torch.eye(6)
    assert cut(flat_II, "auto") is flat_II


def test_a_narrower_cut_of_a_leading_moment_is_that_of_the_matrix_it_stands_for() -> None:
    five = cut(drawn(3), 5)
    close(whole(cut(five, 2)), flattened(whole(five), 2))
    assert cut(five, 7) is five
    assert cut(five, "auto") is five


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0.1, 9))
@settings(max_examples=20, deadline=None)
def test_a_sum_is_that_of_the_matrices_cut_to_the_wider_rank(first: int, second: int, share: float) -> None:
    a, b = cut(drawn(1), first), cut(drawn(2), second)
    expected = flattened(whole(a).double() + share * whole(b).double(), max(first, second))
    close(whole(summed([a, b], [1, share])), expected, 1e-5)
    close(summed([a, drawn(4)], [1, share]), whole(a) + share * drawn(4))


def test_of_zeros_there_is_nothing_and_nothing_fails() -> None:
    nothing = torch.zeros(3, SIZE)
    assert torch.equal(whole(nothing), torch.zeros(SIZE, SIZE))
    assert torch.equal(mean_eigenvalue_one(nothing), nothing)
    assert torch.equal(summed([nothing, nothing], [1, 1]), nothing)
    values_I, u_IK = spectrum(nothing)
    assert not values_I.any()
    assert u_IK.shape == (SIZE, 1)
    rows_RD = torch.randn(2, SIZE)
    assert freed(rows_RD, nothing, 5.0) is rows_RD


def test_fewer_directions_than_asked_for_leave_rows_of_zeros_and_the_same_matrix() -> None:
    """Inputs that span two dimensions: the third direction is nothing's."""
    x = torch.zeros(SIZE, 2)
    x[0, 0], x[3, 1] = 2.0, 1.0
    c_II = x @ x.t()
    close(whole(summed([cut(c_II, 3), cut(c_II, 3)], [1, 1])), 2 * c_II)
    assert spectrum(cut(c_II, 3))[1].shape[1] == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_sketch_finds_what_a_decomposition_finds(seed: int) -> None:
    """Of a spectrum over three orders of magnitude; its eigenvalues are never above the true ones."""
    c_II, sketch = drawn(seed, 40), Sketch(4)
    root_II = torch.linalg.cholesky(c_II.double()).float().t()
    total_LI = torch.zeros(sketch.rows, 40)
    for part_NI in root_II.split(7):
        sketch.add(total_LI, part_NI)
    found, best = sketch.result(total_LI), cut(c_II, 4)
    assert found.shape == best.shape
    assert trace(found) == pytest.approx(float(c_II.trace()), rel=1e-5)
    u_IK, best_IK = spectrum(found)[1], spectrum(best)[1]
    held, most = (float((u.t() @ c_II.double() @ u).trace()) for u in (u_IK, best_IK))
    assert 0.97 * most <= held <= most * (1 + 1e-6)
    assert 0.85 <= float(spectrum(found)[0][0] / spectrum(best)[0][0]) <= 1 + 1e-5


def test_a_sketch_of_few_directions_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(3, 40, generator=generator)
    sketch = Sketch(4)
    total_LI = torch.zeros(sketch.rows, 40)
    sketch.add(total_LI, x_NI)
    close(whole(sketch.result(total_LI)), x_NI.t() @ x_NI, 1e-4)


def test_prior_of_a_rank_is_the_whole_one_cut_and_a_sketch_near_it() -> None:
    """hidden 16: at rank 5 maps of 16 are summed whole, at rank 2 all are sketched."""
    for rank, within in ((5, 1e-5), (2, 0.5)):
        priors = [
            compute_prior(double("llama"), ROWS, {"name": "inputs", "rank": r, "batch_size": 3}, pad_id=0)
            for r in (None, rank)
        ]
        assert priors[0].shapes == priors[1].shapes
        for name, c_II in priors[0].items():
            got = priors[1][name]
            assert len(got) == rank + 1
            if len(c_II) <= 4 * rank + 1:
                close(whole(got), flattened(c_II, rank), within)
            assert trace(got) == pytest.approx(trace(c_II), rel=1e-5)


def test_batch_size_and_order_change_nothing_but_rounding_in_a_sketch() -> None:
    options = {"name": "inputs", "rank": 2, "weighting": "uniform"}
    one, other = (
        compute_prior(double("llama"), rows, {**options, "batch_size": size}, pad_id=0)
        for rows, size in ((ROWS, 1), (ROWS[::-1], 4))
    )
    for name in one:
        close(whole(one[name]), whole(other[name]), 1e-5)


def leading_prior(model: Any, rank: int, seed: int = 0) -> ImportancePrior:
    weights, dims = block_parameters(model), input_dims(model)
    sizes = {name: weights[name].shape[dims[name]] for name in weights if name in dims}
    tensors = {name: drawn(seed + at, size) for at, (name, size) in enumerate(sizes.items())}
    return ImportancePrior(tensors, {"kind": "inputs", "importance": "inputs"}).leading(rank)


def test_it_is_saved_loaded_merged_compared_and_checked_as_any_prior(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first, second = leading_prior(model, 2), leading_prior(model, 3, seed=50)
    again = ImportancePrior.load(first.save(tmp_path / "prior"))
    assert all(torch.equal(again[name], first[name]) for name in first)
    again.check_fits(model)
    merged = first.mean_normalised().merge(second.mean_normalised())
    merged.check_fits(model)
    assert {len(c) for c in merged.tensors.values()} == {4}
    assert first.top(1)[0].value == pytest.approx(
        max(float(diagonal(c).max()) for c in first.tensors.values())
    )
    assert {row["shape"] for row in first.table()} <= {f"{n}x{n}" for n in (16, 32, 48, 64)}
    assert all(a.overlap == pytest.approx(1) for a in agreement(first, again).values())
    mean = first.merge(second, how="mean")
    for name in mean:
        close(whole(mean[name]), flattened((whole(first[name]) + whole(second[name])) / 2, 3), 1e-5)


def test_a_tensor_of_neither_form_is_refused() -> None:
    model = tiny_model("llama")
    prior = leading_prior(model, 2)
    name = next(iter(prior))
    bad = ImportancePrior(
        {**prior.tensors, name: torch.ones(prior.shapes[name][0] - 1, prior.shapes[name][0])}, prior.meta
    )
    with pytest.raises(PriorMismatchError, match="of another shape"):
        bad.check_fits(model)


def test_controls_keep_the_spectrum_or_its_mean() -> None:
    prior = leading_prior(tiny_model("llama"), 3).mean_normalised()
    permuted, mean = (apply_control(prior, control) for control in ("permuted", "tensor-mean"))
    for name, c in prior.items():
        close(spectrum(permuted[name])[0], spectrum(c)[0], 1e-5)
        assert (spectrum(permuted[name])[1].t() @ spectrum(c)[1]).abs().max() < 0.99
        close(whole(mean[name]), torch.eye(c.shape[1]))


def test_drift_is_that_of_the_matrices_it_stands_for() -> None:
    model = tiny_model("llama").double()
    prior = leading_prior(model, 3)
    matrices = ImportancePrior({name: whole(c) for name, c in prior.items()}, prior.meta)
    reference = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in block_parameters(model).items()}
    found, expected = drift(prior, model, reference), drift(matrices, model, reference)
    assert found.maps == pytest.approx(expected.maps, rel=1e-5)


def test_rows_of_a_new_lora_are_freed_as_by_the_matrix() -> None:
    rows_RD, kept = torch.randn(3, SIZE, dtype=torch.float64), cut(drawn(0), 3)
    close(freed(rows_RD, kept, 5.0), freed(rows_RD, whole(kept), 5.0), 1e-5)


@pytest.mark.parametrize("size", [2, 8])
def test_auto_of_zeros_is_a_moment_that_all_goes_on_with(size: int) -> None:
    zero = cut(torch.zeros(size, size), "auto")
    other = cut(torch.diag(torch.tensor([5.0, *[1e-4] * (size - 1)])), "auto")
    assert not whole(zero).any()
    values, _ = spectrum(zero)
    assert not values.any()
    close(whole(summed([zero, other], [1, 1])), whole(other))
    assert not whole(summed([zero, zero], [1, 1])).any()


def test_auto_of_a_leading_moment_keeps_as_few_as_the_matrix_would() -> None:
    c = torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.01, 0.005, *[1e-5] * 11]))
    wide = cut(c, 6)
    assert cut(wide, "auto").shape == cut(c, "auto").shape == (4, 16)
    close(whole(cut(wide, "auto")), whole(cut(c, "auto")))
    flat = cut(torch.eye(16), 3)
    assert cut(flat, "auto") is flat  # its directions have less than that
