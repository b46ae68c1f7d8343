from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.importance.agreement import agreement, compare, ranks, sampled, top_shares
from holdfast.importance.prior import ImportancePrior
from holdfast.names import block_of

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"

numbers = st.integers(-6, 6).map(float)  # few values: ties are common
vectors = st.lists(numbers, min_size=2, max_size=40)
pairs = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[st.lists(numbers, min_size=n, max_size=n) for _ in range(2)])
)


def literal_ranks(values: list[float]) -> list[float]:
    """1 + how many are smaller + half of the others that are equal."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def literal_spearman(first: list[float], second: list[float]) -> float:
    a, b = literal_ranks(first), literal_ranks(second)
    mean = (len(a) + 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def literal_overlap(first: list[float], second: list[float], top: float) -> float:
    """|P ∩ Q| / K; only right where no value appears twice."""
    count = max(1, round(top * len(first)))
    best = [set(sorted(range(len(v)), key=lambda i: -v[i])[:count]) for v in (first, second)]
    return len(best[0] & best[1]) / count


def constant(*values: list[float]) -> bool:
    return any(len(set(v)) == 1 for v in values)


def both(first: list[float], second: list[float], top: float = 0.1) -> tuple[float, float]:
    overlap_TT, spearman_TT = compare([torch.tensor(first), torch.tensor(second)], top)
    return overlap_TT[0, 1].item(), spearman_TT[0, 1].item()


def test_ranks_by_hand_with_ties_at_their_mean():
    assert ranks(torch.tensor([10.0, 30.0, 20.0, 20.0, -1.0])).tolist() == [2, 5, 3.5, 3.5, 1]


def test_spearman_by_hand():
    # ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 · (1 + 1 + 1 + 1) / (5 · 24)
    assert both([1, 2, 3, 4, 5], [20, 10, 40, 30, 50])[1] == pytest.approx(0.8, abs=1e-12)


def test_overlap_by_hand():
    # the three largest: elements 7 8 9 against 6 7 9
    assert both([*range(10)], [0, 0.1, 0.2, 0.3, 0.4, 0.5, 8, 9, 1, 7], top=0.3)[0] == pytest.approx(2 / 3)


def test_elements_that_tie_for_the_last_places_share_them():
    assert top_shares(torch.tensor([5.0, 1.0, 1.0, 1.0, 0.0]), 0.4).tolist() == pytest.approx(
        [1, 1 / 3, 1 / 3, 1 / 3, 0]
    )


def test_disjoint_sets_do_not_overlap_although_all_else_ties():
    first, second = [1.0, 1.0] + [0.0] * 18, [0.0] * 18 + [1.0, 1.0]
    assert both(first, second)[0] == 0


@given(pairs)
def test_spearman_equals_the_literal_formula_ties_included(pair):
    if not constant(*pair):
        assert both(*pair)[1] == pytest.approx(literal_spearman(*pair), abs=1e-12)


@given(st.integers(2, 60), st.integers(0, 10**6), st.sampled_from([0.05, 0.1, 0.3, 0.9]))
def test_overlap_equals_the_literal_sets_where_nothing_ties(size, seed, top):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randperm(size, generator=generator).double().tolist() for _ in range(2))
    assert both(first, second, top)[0] == pytest.approx(literal_overlap(first, second, top), abs=1e-12)


@given(vectors)
def test_a_prior_agrees_with_itself_entirely(values):
    overlap, spearman = both(values, values)
    if constant(values):
        assert math.isnan(overlap)
        assert math.isnan(spearman)
    else:
        assert (overlap, spearman) == pytest.approx((1, 1), abs=1e-12)


@given(vectors)
def test_a_reversed_prior_has_correlation_minus_one(values):
    if not constant(values):
        assert both(values, [-v for v in values])[1] == pytest.approx(-1, abs=1e-12)


@given(pairs, st.randoms(use_true_random=False))
def test_agreement_depends_neither_on_the_order_of_elements_nor_on_scale_nor_on_who_is_first(pair, random):
    order = list(range(len(pair[0])))
    random.shuffle(order)
    shuffled = [[values[i] for i in order] for values in pair]
    expected = pytest.approx(both(*pair), abs=1e-12, nan_ok=True)
    assert both(*shuffled) == expected
    assert both([3 * v + 1 for v in pair[0]], pair[1]) == expected
    assert both(pair[1], pair[0]) == expected


@settings(max_examples=30)
@given(st.integers(1, 5000), st.integers(1, 400), st.integers(0, 9))
def test_a_sample_takes_distinct_elements_of_the_whole_tensor_and_the_same_each_time(size, most, seed):
    chosen = sampled(size, most, seed)
    if size <= most:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert 0.5 * most <= len(chosen) <= most
    assert 0 <= chosen[0] < size / most
    assert size - size / most - 1 <= chosen[-1] < size
    again = sampled(size, most, seed)
    assert again is not None
    assert torch.equal(chosen, again)


def test_priors_are_compared_tensor_by_tensor_and_averaged_by_size():
    up = torch.arange(30.0).reshape(5, 6)
    q = torch.arange(10.0).reshape(2, 5)
    first = ImportancePrior({Q: q, UP: up, "lm_head.weight": torch.ones(2, 2)})
    second = ImportancePrior({UP: 1000 + up, Q: -q, "lm_head.weight": torch.ones(2, 2)})
    found = agreement(first, second)
    # q: -1 and nothing in common, up: the same order; the tensors' levels don't matter
    assert list(found) == [("", 0)]
    assert found["", 0].correlation == pytest.approx((10 * -1 + 30 * 1) / 40)
    assert found["", 0].overlap == pytest.approx(30 / 40)


def test_a_constant_tensor_has_no_say():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4, 4, generator=generator)
    found = agreement(
        ImportancePrior({Q: values, UP: torch.zeros(9, 9)}),
        ImportancePrior({Q: values, UP: torch.rand(9, 9, generator=generator)}),
    )
    assert found["", 0].correlation == pytest.approx(1)
    assert found["", 0].overlap == pytest.approx(1)


def test_layers_come_by_number_and_the_encoder_before_the_decoder():
    names = [f"{s}.block.{i}.layer.0.SelfAttention.q.weight" for s in ("decoder", "encoder") for i in (10, 2)]
    prior = ImportancePrior({name: torch.arange(4.0) for name in names})
    assert list(agreement(prior, prior)) == [("encoder", 2), ("encoder", 10), ("decoder", 2), ("decoder", 10)]
    assert block_of("lm_head.weight") is None


def test_unrelated_priors_agree_as_much_as_chance():
    generator = torch.Generator().manual_seed(0)
    first, second = (ImportancePrior({Q: torch.rand(200, 200, generator=generator)}) for _ in range(2))
    found = agreement(first, second)["", 0]
    assert found.overlap == pytest.approx(0.1, abs=0.01)
    assert found.correlation == pytest.approx(0, abs=0.02)


def test_a_sample_of_a_tensor_tells_nearly_the_same():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(300, 300, generator=generator)
    second = first + 0.5 * torch.rand(300, 300, generator=generator)
    priors = ImportancePrior({Q: first}), ImportancePrior({Q: second})
    exact, close = agreement(*priors)["", 0], agreement(*priors, sample=20_000)["", 0]
    assert close.overlap == pytest.approx(exact.overlap, abs=0.02)
    assert close.correlation == pytest.approx(exact.correlation, abs=0.01)


def moments(*spectrum: float, turned: int | None = None) -> torch.Tensor:
    c_II = torch.diag(torch.tensor(spectrum))
    if turned is None:
        return c_II
    generator = torch.Generator().manual_seed(turned)
    q_II, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator))
    return q_II @ c_II @ q_II.t()


def of_inputs(tensor: torch.Tensor, name: str = Q) -> ImportancePrior:
    return ImportancePrior({name: tensor}, {"kind": "inputs"})


def test_leading_directions_on_axes_overlap_as_sets_do():
    first, second = moments(9, 8, 1, 2, 0.5, 0.1), moments(9, 1, 8, 2, 0.5, 0.1)
    found = agreement(of_inputs(first), of_inputs(second), top=1 / 3)["", 0]
    assert found.overlap == pytest.approx(1 / 2)
    c, d = first.diagonal().double(), second.diagonal().double()
    assert found.correlation == pytest.approx(torch.corrcoef(torch.stack([c, d]))[0, 1].item())


def test_agreement_by_inputs_does_not_depend_on_the_basis_they_are_written_in():
    first, second = moments(9, 8, 1, 2, 0.5, turned=0), moments(7, 6, 3, 1, 0.5, turned=1)
    turn_II = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))[0]
    expected = agreement(of_inputs(first), of_inputs(second), top=0.4)["", 0]
    rotated = [of_inputs(turn_II @ c_II @ turn_II.t()) for c_II in (first, second)]
    found = agreement(rotated[0], rotated[1], top=0.4)["", 0]
    both_of = pytest.approx((expected.overlap, expected.correlation), rel=1e-5)  # float32 matrices
    assert (found.overlap, found.correlation) == both_of
    assert 0 < found.overlap < 1


def test_unrelated_inputs_agree_as_much_as_chance():
    spectrum = [1 / (i + 1) for i in range(200)]
    first, second = (of_inputs(moments(*spectrum, turned=seed)) for seed in (0, 1))
    found = agreement(first, second)["", 0]
    assert found.overlap == pytest.approx(0.1, abs=0.03)
    assert found.correlation == pytest.approx(0, abs=0.03)


def test_inputs_that_are_alike_in_all_directions_have_no_say():
    eye, other = of_inputs(torch.eye(4)), of_inputs(moments(4, 3, 2, 1))
    assert math.isnan(agreement(eye, other)["", 0].overlap)
    assert agreement(other, other)["", 0].overlap == pytest.approx(1)


def test_priors_of_two_kinds_are_not_compared():
    with pytest.raises(
        PriorMismatchError, match=r"comparison: the priors are of different kinds \(weights, inputs\)"
    ):
        agreement(ImportancePrior({Q: torch.eye(2)}), of_inputs(torch.eye(2)))


def test_priors_of_different_weights_are_refused_by_name():
    first = ImportancePrior({Q: torch.ones(2, 2)})
    with pytest.raises(PriorMismatchError, match=r"missing \(1\): \S+q_proj\.weight\. Use a prior computed"):
        agreement(first, ImportancePrior({}))
    with pytest.raises(PriorMismatchError, match=r"q_proj\.weight \(2, 3\) instead of \(2, 2\)"):
        agreement(first, ImportancePrior({Q: torch.ones(2, 3)}))


@pytest.mark.parametrize("top", [0.0, 1.0, 2, -0.1])
def test_a_share_that_selects_none_or_all_is_refused(top):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        compare([torch.arange(3.0)] * 2, top)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        agreement(ImportancePrior({Q: torch.eye(2)}), ImportancePrior({Q: torch.eye(2)}), top=top)
