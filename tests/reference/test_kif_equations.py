"""Every equation of K against literal float64 code on small tensors (eqs. 3 to 17, Algorithms 1 and 2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.errors import ConfigError, HoldfastError
from holdfast.hold.fusion import (
    AdaptiveFusionOptions,
    StaticFusionOptions,
    fuse,
    old_shares,
)
from holdfast.importance.prior import trained_parameters
from holdfast.importance.sensitivity import Sensitivity, SensitivityOptions
from holdfast.importance.skill_units import (
    SkillUnit,
    Slice,
    accumulated,
    important,
    lora_units,
    masks,
    matrix_units,
    normalised,
    unit_scores,
)
from holdfast.models import LoraOptions, add_lora, tiny_llama
from holdfast.strategies.kif.orthogonal import Orthogonality, orthogonality
from holdfast.tasks import toy_tokenizer

SIZES = st.integers(1, 5)


def adapter(out: int, rank: int, inner: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q_proj.lora_A.weight": torch.randn(rank, inner, generator=generator, dtype=torch.float64),
        "layers.0.q_proj.lora_B.weight": torch.randn(out, rank, generator=generator, dtype=torch.float64),
    }


# skill units, eqs. 3, 4 and 6


@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_lora_units_sum_to_the_adapters_product(out: int, rank: int, inner: int, seed: int) -> None:
    """Eqs. 3 and 4."""
    factors = adapter(out, rank, inner, seed)
    a, b = factors.values()
    units = lora_units(factors)
    assert [unit.name for unit in units] == [f"layers.0.q_proj[{i}]" for i in range(rank)]
    total = torch.zeros(out, inner, dtype=torch.float64)
    for unit in units:
        row, column = (part.of(factors[part.parameter]) for part in unit.slices)
        total += torch.outer(column, row)
    torch.testing.assert_close(total, b @ a)


@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_factored_score_is_the_mean_over_the_product_that_is_never_built(
    out: int, rank: int, inner: int, seed: int
) -> None:
    """Eq. 6 with s(b_k a_l) = s(b_k) s(a_l), literally, entry by entry."""
    s = {name: value.abs() for name, value in adapter(out, rank, inner, seed).items()}
    s_a, s_b = s.values()
    literal = []
    for i in range(rank):
        entries = [float(s_b[k, i] * s_a[i, m]) for k in range(out) for m in range(inner)]
        literal.append(sum(entries) / (inner * out))
    scores = unit_scores(lora_units(s), s)
    torch.testing.assert_close(scores, torch.tensor(literal, dtype=torch.float64))
    means = [float(torch.cat([s_a[i], s_b[:, i]]).mean()) for i in range(rank)]
    both = unit_scores(lora_units(s), s, "mean")
    torch.testing.assert_close(both, torch.tensor(means, dtype=torch.float64))


@given(SIZES, SIZES, st.integers(0, 99))
def test_matrix_units_score_is_the_mean_of_its_entries(out: int, inner: int, seed: int) -> None:
    s = {name: value.abs() for name, value in adapter(out, 2, inner, seed).items()}
    expected = torch.stack([value.mean() for value in s.values()])
    for score in ("product", "mean"):
        torch.testing.assert_close(unit_scores(matrix_units(s), s, score), expected)


def test_weights_outside_the_factors_are_units_of_their_own() -> None:
    factors = {**adapter(3, 2, 4, 0), "classifier.bias": torch.ones(5)}
    assert lora_units(factors)[-1] == SkillUnit("classifier.bias", (Slice("classifier.bias"),))


def test_embedding_adapters_have_units_too() -> None:
    factors = {"wte.lora_embedding_A": torch.ones(2, 7), "wte.lora_embedding_B": torch.ones(3, 2)}
    assert [unit.name for unit in lora_units(factors)] == ["wte[0]", "wte[1]"]


# sensitivity, eqs. 8 to 12


def model_and_batch(seed: int = 0) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A LoRA Llama in float64 whose B is not zero, and two micro-batches with answers of several lengths."""
    model = add_lora(tiny_llama(toy_tokenizer(), seed=1, hidden=16, layers=2), LoraOptions(r=3), seed=2)
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    batches = []
    for lengths in ((1, 3), (2, 4, 1)):
        ids = torch.randint(5, 30, (len(lengths), 9), generator=generator)
        labels = torch.full_like(ids, -100)
        for row, length in enumerate(lengths):
            labels[row, 9 - length :] = ids[row, 9 - length :]
        batches.append({"input_ids": ids, "labels": labels})
    return model, batches


def token_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    found = []
    for row, labels in enumerate(batch["labels"][:, 1:]):
        kept = [-logits[row, t, y] for t, y in enumerate(labels.tolist()) if y != -100]
        found.append(torch.stack(kept))
    return found


def backward_of_the_step(model: nn.Module, batches: list[dict[str, torch.Tensor]], watch: Any) -> None:
    """The training's loss: the mean over all answer tokens of the step, micro-batch by micro-batch."""
    model.zero_grad()
    total = sum(int((b["labels"] != -100).sum()) for b in batches)
    for batch in batches:
        watch(batch)
        (torch.cat(token_losses(model, batch)).sum() / total).backward()


@pytest.mark.parametrize("order", ["first", "second", "second-batch", "gradient"])
def test_sensitivity_of_a_step_is_the_equation(order: Any) -> None:
    """Eqs. 8 and 9, the latter with one backward pass a sample, as it is written."""
    model, batches = model_and_batch()
    parameters = trained_parameters(model)
    seen = Sensitivity(model, parameters, SensitivityOptions(order=order, smoothing=False))
    backward_of_the_step(model, batches, seen.watch)
    seen.observe()
    seen.remove()

    everything = torch.cat([loss for b in batches for loss in token_losses(model, b)])
    batch_gradient = torch.autograd.grad(everything.mean(), list(parameters.values()))
    samples = [loss.mean() for b in batches for loss in token_losses(model, b)]
    own = [torch.autograd.grad(s, list(parameters.values()), retain_graph=True) for s in samples]
    for index, (name, w) in enumerate(parameters.items()):
        w, g = w.detach(), batch_gradient[index]
        expected = {
            "first": (w * g).abs(),
            "second": (g * w - 0.5 * sum((sample[index] * w) ** 2 for sample in own)).abs(),
            "second-batch": (g * w - 0.5 * (g * w) ** 2).abs(),
            "gradient": g.abs(),
        }[order]
        assert expected.max() > 0
        torch.testing.assert_close(seen.result()[name].double(), expected, rtol=1e-4, atol=1e-10, msg=name)


def test_sample_gradients_leave_the_trainings_gradient_alone() -> None:
    model, batches = model_and_batch()
    parameters = trained_parameters(model)
    backward_of_the_step(model, batches, lambda batch: None)
    plain = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    seen = Sensitivity(model, parameters, SensitivityOptions(order="second"))
    backward_of_the_step(model, batches, seen.watch)
    assert all(torch.equal(p.grad, plain[n]) for n, p in parameters.items() if p.grad is not None)


def test_scaled_gradients_of_fp16_give_the_same_sensitivity() -> None:
    results = []
    for scale in (1.0, 1 / 1024):
        model, batches = model_and_batch()
        seen = Sensitivity(model, trained_parameters(model), SensitivityOptions(order="second"))
        backward_of_the_step(model, batches, seen.watch)
        for p in trained_parameters(model).values():
            p.grad /= scale
        for total in seen.squares._fold.sums.values():  # what the hooks would have seen
            total /= scale**2
        for total in seen.squares._fold.gradients.values():
            total /= scale
        seen.observe(scale)
        results.append(seen.result())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


@pytest.mark.parametrize("order", ["first", "second", "second-batch", "gradient"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_a_gradient_scaler_passes_over_leaves_the_sensitivity_as_it_was(
    order: Any, bad: float
) -> None:
    results = []
    for overflows in (False, True):
        model, batches = model_and_batch()
        parameters = trained_parameters(model)
        seen = Sensitivity(model, parameters, SensitivityOptions(order=order))
        if overflows:
            backward_of_the_step(model, batches[:1], seen.watch)
            gradient: Any = next(iter(parameters.values())).grad
            gradient[0, 0] = bad
            seen.observe()
        backward_of_the_step(model, batches, seen.watch)
        seen.observe()
        results.append(seen.result())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_scores_that_are_not_finite_are_refused_by_number() -> None:
    with pytest.raises(HoldfastError, match="1 of 3 scores are not finite, the first that of unit 1"):
        normalised(torch.tensor([1.0, math.nan, 3.0]))


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.floats(0.0, 0.99, exclude_min=True),
    st.floats(0.0, 0.99),
    st.integers(0, 99),
    st.booleans(),
)
def test_smoothing_and_uncertainty_follow_the_trajectory(
    steps: int, alpha1: float, alpha2: float, seed: int, smoothing: bool
) -> None:
    """Eqs. 10, 11 and 12 in plain Python, one weight at a time; Algorithm 1."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(2, 2, bias=False).double()
    shares = {"alpha1": alpha1, "alpha2": alpha2} if smoothing else {}
    options = SensitivityOptions(smoothing=smoothing, **shares)
    seen = Sensitivity(layer, {"w": layer.weight}, options)
    mean, spread = [0.0] * 4, [0.0] * 4
    for _ in range(steps):
        gradient = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        layer.weight.grad = gradient
        now = (layer.weight.detach() * gradient).abs().flatten().tolist()
        seen.observe()
        for j, value in enumerate(now):
            mean[j] = alpha1 * mean[j] + (1 - alpha1) * value
            spread[j] = alpha2 * spread[j] + (1 - alpha2) * abs(value - mean[j])
        with torch.no_grad():
            layer.weight.sub_(0.1 * gradient)
    expected = [m * u for m, u in zip(mean, spread, strict=True)] if smoothing else now
    torch.testing.assert_close(seen.result()["w"].flatten().tolist(), expected, rtol=1e-4, atol=1e-7)


# accumulation, eq. 13


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=8), st.floats(0, 1))
def test_accumulated_scores_are_the_weighted_sum_of_normalised_ones(values: list[float], beta: float) -> None:
    old, new = torch.tensor(values, dtype=torch.float64), torch.tensor(values[::-1], dtype=torch.float64)

    def norm(v: list[float]) -> list[float]:
        return [(x - min(v)) / (max(v) - min(v)) if max(v) > min(v) else 0.0 for x in v]

    expected = [beta * a + (1 - beta) * b for a, b in zip(norm(values), norm(values[::-1]), strict=True)]
    result = accumulated(old, new, beta)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))
    assert normalised(old).min() >= 0
    assert normalised(old).max() <= 1


# which units are important


def test_a_fifth_of_the_units_is_important() -> None:
    chosen = important(torch.arange(10.0), 0.2)
    assert chosen.tolist() == [False] * 8 + [True] * 2


def test_distribution_rule_finds_the_gap_however_many_are_above_it() -> None:
    for high in (1, 3, 7):
        scores = torch.cat([torch.linspace(0, 0.2, 10 - high), torch.linspace(0.8, 1.0, high)])
        assert important(scores, "distribution").sum() == high
    assert not important(torch.ones(5), "distribution").any()


# fusion, eqs. 15 to 17


def test_static_fusion_has_the_papers_four_cases() -> None:
    """Eq. 15; the top fifth of ten units is two."""
    old = torch.tensor([9.0, 8, 1, 1, 1, 1, 1, 1, 1, 0])
    new = torch.tensor([9.0, 1, 8, 1, 1, 1, 1, 1, 1, 0])
    share = old_shares(old, new, StaticFusionOptions(gamma=0.3))
    assert share.tolist()[:4] == pytest.approx([0.3, 1.0, 0.0, 0.5])
    assert share.tolist()[4:] == [0.5] * 6


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(0.05, 5))
def test_adaptive_shares_are_the_softmax_of_the_equation(values: list[float], tau: float) -> None:
    """Eqs. 16 and 17, exponentials and all."""
    old = normalised(torch.tensor(values, dtype=torch.float64))
    new = normalised(torch.tensor(values[::-1], dtype=torch.float64))
    literal = [
        math.exp(o / tau) / (math.exp(o / tau) + math.exp(n / tau))
        for o, n in zip(old.tolist(), new.tolist(), strict=True)
    ]
    shares = old_shares(old, new, AdaptiveFusionOptions(tau=tau))
    torch.testing.assert_close(shares, torch.tensor(literal, dtype=torch.float64))


@given(SIZES, st.integers(1, 4), SIZES, st.integers(0, 99))
def test_factors_are_averaged_each_by_itself_and_exactly_at_both_ends(
    out: int, rank: int, inner: int, seed: int
) -> None:
    now, old = adapter(out, rank, inner, seed), adapter(out, rank, inner, seed + 1)
    share = torch.rand(rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share[0] = float(seed % 2)
    fused = {name: value.clone() for name, value in now.items()}
    fuse(lora_units(now), fused, old, share)
    for name, value in fused.items():
        w = share[:, None] if "lora_A" in name else share[None, :]
        torch.testing.assert_close(value, w * old[name] + (1 - w) * now[name])
    end = (old, now)[1 - seed % 2]
    a, b = fused.values()
    end_a, end_b = end.values()
    assert torch.equal(a[0], end_a[0])
    assert torch.equal(b[:, 0], end_b[:, 0])


@given(st.integers(1, 4), SIZES, SIZES, st.integers(0, 99), st.floats(0.05, 0.95))
def test_averaged_product_is_the_nearest_matrix_of_rank_one(
    rank: int, out: int, inner: int, seed: int, keep: float
) -> None:
    now, old = adapter(out, rank, inner, seed), adapter(out, rank, inner, seed + 1)
    fused = {name: value.clone() for name, value in now.items()}
    fuse(lora_units(now), fused, old, torch.tensor([keep] * rank, dtype=torch.float64), averaged="product")
    (a, b), (old_a, old_b), (new_a, new_b) = fused.values(), old.values(), now.values()
    for i in range(rank):
        mean = keep * torch.outer(old_b[:, i], old_a[i]) + (1 - keep) * torch.outer(new_b[:, i], new_a[i])
        u, s, vh = torch.linalg.svd(mean)
        gap = (mean - torch.outer(b[:, i], a[i])).norm()
        best = (mean - s[0] * torch.outer(u[:, 0], vh[0])).norm()
        assert float(gap) == pytest.approx(float(best), abs=1e-9)
        assert float(a[i].norm()) == pytest.approx(float(new_a[i].norm()))


def test_masks_mark_the_chosen_units_and_no_others() -> None:
    factors = adapter(3, 2, 4, 0)
    a, b = masks(lora_units(factors), torch.tensor([False, True]), factors).values()
    assert a.tolist() == [[0.0] * 4, [1.0] * 4]
    assert b.tolist() == [[0.0, 1.0]] * 3


# orthogonality, eq. 5


@given(SIZES, st.integers(1, 4), SIZES, st.integers(0, 99))
def test_regulariser_and_its_gradient_are_those_of_the_equation(
    out: int, rank: int, inner: int, seed: int
) -> None:
    factors = {n: nn.Parameter(v.float()) for n, v in adapter(out, rank, inner, seed).items()}
    a, b = factors.values()
    literal = torch.zeros(())
    for i in range(rank):
        for j in range(rank):
            literal = literal + ((a[i] @ a[j]) - float(i == j)) ** 2
            literal = literal + ((b[:, i] @ b[:, j]) - float(i == j)) ** 2
    torch.testing.assert_close(orthogonality(factors), literal, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(literal, [a, b])
    start = [a.detach().clone(), b.detach().clone()]
    optimizer = torch.optim.SGD([a, b], lr=0.01)
    handle = Orthogonality(factors, 0.5).attach(torch.nn.Module(), optimizer)
    optimizer.step()
    for w, before, gradient in zip((a, b), start, expected, strict=True):
        torch.testing.assert_close(w.detach(), before - 0.01 * 0.5 * gradient, rtol=1e-3, atol=1e-4)
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks


class Shortcut(nn.Module):
    """Uses a linear layer's weight past the layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.layer.weight


def test_samples_that_do_not_sum_to_the_batchs_gradient_are_refused_in_the_first_step() -> None:
    model = Shortcut()
    seen = Sensitivity(model, dict(model.named_parameters()), SensitivityOptions(order="second"))
    seen.watch({"labels": torch.zeros(3, 2, dtype=torch.long)})
    model(torch.randn(3, 2, 4)).square().sum().backward()
    with pytest.raises(ConfigError, match=r"those of layer\.weight sum to something else.*'second-batch'"):
        seen.observe()
