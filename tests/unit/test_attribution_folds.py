"""The folds against eqs. 10 and 11 written out, sample by sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.importance.aggregate import EPSILON, AbsoluteMean, SquareMean, TopKMean


def equation_10(relevance: Tensor) -> Tensor:
    logarithm = torch.log(1 + relevance.abs())
    return torch.sign(relevance) * logarithm / (logarithm.max() + EPSILON)


def equation_11(normalised: list[Tensor], k: int) -> Tensor:
    stacked = torch.stack(normalised)
    return stacked.topk(min(k, len(normalised)), dim=0).values.sum(0) / min(k, len(normalised))


def feed(fold, weight: Tensor, grads: Tensor, sizes: list[int]) -> Tensor:
    """Give the fold the samples in parts; the memory is reused, as the engine does."""
    start = 0
    while start < len(grads):
        size = sizes[start % len(sizes)]
        scratch = grads[start : start + size].clone()
        fold.update("w", weight, scratch)
        scratch.fill_(torch.nan)
        start += size
    return fold.result()["w"]


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 12),
    k=st.integers(1, 9),
    shape=st.sampled_from([(7,), (3, 5), (1, 1), (300, 230)]),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    per_weight=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_topk_is_equations_10_and_11(samples, k, shape, sizes, scale, per_weight, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = torch.randn((samples, *shape), generator=generator, dtype=torch.float64) * scale
    values = list(grads) if per_weight else [weight * grad for grad in grads]
    expected = equation_11([equation_10(value) for value in values], k)
    got = feed(TopKMean(k, per_weight), weight, grads, sizes)
    assert got.dtype == torch.float32
    assert got.shape == shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("per_weight", [False, True])
@pytest.mark.parametrize(("fold", "power"), [(AbsoluteMean, 1), (SquareMean, 2)])
def test_mean_folds_are_means_over_samples(fold, power, per_weight) -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(4, 6), torch.randn(5, 4, 6)
    expected = ((grads if per_weight else weight * grads).abs() ** power).mean(0)
    got = feed(fold(per_weight), weight, grads, [2, 1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fold", [TopKMean(3), AbsoluteMean(), SquareMean()])
def test_a_parameter_that_nothing_reached_has_zero_importance(fold) -> None:
    fold.update("w", torch.ones(2, 3), torch.zeros(0, 2, 3))
    assert torch.equal(fold.result()["w"], torch.zeros(2, 3))


def test_a_map_without_relevance_stays_without() -> None:
    fold = TopKMean(2)
    fold.update("b", torch.ones(4), torch.full((3, 4), 1e-13))  # rounding noise
    assert fold.result()["b"].max() < 1e-4


def test_half_precision_maps_are_folded_in_float32() -> None:
    fold = SquareMean(per_weight=True)
    fold.update("w", torch.ones(1, dtype=torch.bfloat16), torch.full((1000, 1), 0.01, dtype=torch.bfloat16))
    torch.testing.assert_close(fold.result()["w"], torch.tensor([1e-4]), rtol=5e-3, atol=0)


def test_topk_memory_is_stated_and_falls_after_a_pass() -> None:
    fold = TopKMean(5)
    assert fold.bytes_per_element == 4 * 5
    fold.update("w", torch.ones(3), torch.ones(2, 3))
    fold.finish()
    fold.update("v", torch.ones(3), torch.ones(2, 3))
    assert set(fold.result()) == {"v", "w"}


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        TopKMean(0)
