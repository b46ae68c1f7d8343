"""Gate, anchor and penalty against their formulas by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.hold import (
    Anchor,
    Gate,
    Penalty,
)
from holdfast.importance.prior import ImportancePrior
from holdfast.strategies.kif.orthogonal import Orthogonality
from small_network import backward, graded, network, weights


def test_gate_on_gradient_is_equation_13_under_sgd() -> None:
    model = network()
    prior, before = graded(model), weights(model)
    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    Gate(prior, on="gradient").attach(model, optim)
    gradient = backward(model)
    optim.step()
    for name, parameter in model.named_parameters():
        held = prior.tensors[name].double().clamp(0, 1)  # eq. 12 clips at 0; above 1 eq. 13 would go uphill
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * (1 - held) * gradient[name])


def test_gate_on_gradient_acts_once_per_step_whatever_the_accumulation() -> None:
    model = network()
    prior, before = graded(model), weights(model)
    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    Gate(prior, on="gradient").attach(model, optim)
    first, second = backward(model, 2), backward(model, 3)
    backward(model, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, first[name])  # nothing is scaled before the step
        parameter.grad += second[name]
    optim.step()
    for name, parameter in model.named_parameters():
        held = prior.tensors[name].double().clamp(0, 1)
        expected = before[name] - 0.5 * (1 - held) * (first[name] + second[name])
        torch.testing.assert_close(parameter.detach(), expected)


def test_gate_on_update_scales_the_whole_adamw_step() -> None:
    plain, gated = network(), network()
    prior, before = graded(gated), weights(gated)
    optims = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5) for m in (plain, gated)]
    Gate(prior).attach(gated, optims[1])
    for model, optim in zip((plain, gated), optims, strict=True):
        backward(model)
        optim.step()
    new = weights(plain)
    for name, parameter in gated.named_parameters():
        held = prior.tensors[name].double().clamp(0, 1)
        torch.testing.assert_close(parameter.detach(), before[name] + (1 - held) * (new[name] - before[name]))


def test_soft_gate_is_importance_over_quantile_plus_importance() -> None:
    prior = ImportancePrior({"a": torch.tensor([-1.0, 0.0, 1.0, 2.0]), "b": torch.tensor([3.0, 4.0, 5.0])})
    held = dict(Gate(prior, shape="soft", quantile=0.5).held())  # the median of 0 0 1 2 3 4 5 is 2
    torch.testing.assert_close(held["a"], torch.tensor([0.0, 0.0, 1 / 3, 0.5]))
    torch.testing.assert_close(held["b"], torch.tensor([3 / 5, 4 / 6, 5 / 7]))
    sparse = dict(Gate(prior, shape="soft", quantile=0.0).held())  # λ = 0: the limit, and no 0/0
    torch.testing.assert_close(sparse["a"], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_soft_gate_samples_large_priors_the_same_way_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    prior = ImportancePrior({n: torch.rand(200, 100, generator=generator) for n in "ab"})
    exact = Gate(prior, shape="soft", quantile=0.3)._scale()
    monkeypatch.setattr("holdfast.hold.gate._QUANTILE_ELEMENTS", 10_000)
    sampled = Gate(prior, shape="soft", quantile=0.3)._scale()
    assert sampled == Gate(prior, shape="soft", quantile=0.3)._scale()
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=0.02)


def test_top_gate_freezes_the_given_share_of_each_tensor() -> None:
    prior = ImportancePrior({"a": torch.tensor([[4.0, 1.0], [3.0, 2.0]]), "b": torch.tensor([1e-9, 3e-9])})
    held = dict(Gate(prior, shape="top", fraction=0.5).held())
    assert held["a"].tolist() == [[1, 0], [1, 0]]
    assert held["b"].tolist() == [0, 1]
    assert Gate(prior, shape="top", fraction=0.5).summary()["held"] == 0.5


def test_anchor_pulls_by_its_formula_with_the_current_learning_rate_of_each_group() -> None:
    model = network()
    prior = graded(model)
    reference = weights(network().requires_grad_(False))
    reference = {n: t + 0.1 for n, t in reference.items()}
    names = [n for n, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n in names[:2]], "lr": 0.1},
        {"params": [parameters[n] for n in names[2:]]},
    ]
    optim = torch.optim.SGD(groups, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step))
    anchor = Anchor(prior, strength=8.0, reference=reference)
    anchor.attach(model, optim)
    mean = torch.cat([t.clamp(min=0).flatten() for t in prior.tensors.values()]).double().mean()
    for step in range(3):
        before, gradient = weights(model), backward(model)
        optim.step()
        scheduler.step()
        for index, name in enumerate(names):
            rate = (0.1 if index < 2 else 0.02) / (1 + step)
            moved = before[name] - rate * gradient[name]
            importance = prior.tensors[name].double().clamp(min=0) / mean
            keep = 1 - (rate * 8.0 * importance).clamp(max=1)
            expected = reference[name] + keep * (moved - reference[name])
            torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-6, atol=1e-8)
    assert anchor.summary()["learning_rate"] == 0.1


def test_anchor_follows_the_learning_rate_of_a_loaded_optimizer_state() -> None:
    model = network()
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    optim = torch.optim.SGD(model.parameters(), lr=1.0)
    saved = optim.state_dict()
    before = weights(model)
    Anchor(prior, strength=1.0).attach(model, optim)
    saved["param_groups"][0]["lr"] = 0.0  # load_state_dict replaces the group dictionaries
    optim.load_state_dict(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    backward(model)
    optim.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] + 1)


def test_reference_is_not_moved_when_it_is_the_live_parameters() -> None:
    model = network()
    before = weights(model)
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    optim = torch.optim.SGD(model.parameters(), lr=1.0)
    Anchor(prior, strength=1.0, reference=dict(model.named_parameters())).attach(model, optim)
    for _ in range(3):
        backward(model)
        optim.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_penalty_adds_its_formula_and_equals_autograd_of_its_loss() -> None:
    model = network()
    prior = graded(model)
    reference = {n: t - 0.3 for n, t in weights(model).items()}
    penalty = Penalty(prior, strength=7.0, reference=reference)
    gradient = backward(model)
    model.zero_grad()
    loss = penalty.loss(model)
    loss.backward()
    by_autograd = {n: p.grad.clone() for n, p in model.named_parameters()}
    by_hand = sum(
        3.5 * (prior.tensors[n].double().clamp(min=0) * (p - reference[n]) ** 2).sum()
        for n, p in weights(model).items()
    )
    torch.testing.assert_close(loss.detach().double(), by_hand)

    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    penalty.attach(model, optim)
    before = weights(model)
    backward(model)
    optim.step()
    for name, parameter in model.named_parameters():
        pull = 7.0 * prior.tensors[name].double().clamp(min=0) * (before[name] - reference[name])
        torch.testing.assert_close(by_autograd[name], pull, rtol=1e-6, atol=1e-9)
        expected = before[name] - 0.5 * (gradient[name] + pull)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)


def test_penalty_acts_on_a_weight_the_batch_did_not_use() -> None:
    model = network()
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    reference = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    before = weights(model)
    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    Penalty(prior, strength=1.0, reference=reference).attach(model, optim)
    optim.step()  # no backward: every gradient is None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.5 * before[name])


@pytest.mark.parametrize("fused", [True, False])
def test_penalty_is_not_divided_by_a_gradient_scaler(fused: bool) -> None:
    ends = []
    for scale in (1.0, 1024.0):
        model = network(torch.float32)
        reference = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        optim = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        Penalty(graded(model), strength=1.0, reference=reference).attach(model, optim)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        scaler.step(optim)  # a fused optimizer unscales inside its step, after the hook
        ends.append(weights(model))
    for name, end in ends[0].items():
        torch.testing.assert_close(end, ends[1][name])


def test_penalty_loss_without_a_reference_says_what_to_give() -> None:
    with pytest.raises(HoldfastError, match="give `reference="):
        Penalty(graded(network())).loss(network())


@pytest.mark.parametrize("fused", [True, False])
def test_orthogonality_is_not_divided_by_a_gradient_scaler(fused: bool) -> None:
    ends = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        factor = nn.Parameter(torch.randn(2, 3))
        optim = torch.optim.SGD([factor], lr=0.01, fused=fused)
        Orthogonality({"0.lora_A.weight": factor}, 1.0).attach(nn.Module(), optim)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(factor.sum()).backward()
        scaler.step(optim)
        ends.append(factor.detach())
    torch.testing.assert_close(ends[0], ends[1])
