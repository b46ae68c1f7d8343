"""lora-moe: experts weighted token by token, and the localized balancing constraint, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models.adapters import lora_factors, lora_layers
from holdfast.strategies import STRATEGIES
from holdfast.strategies.lora.moe import Routers, imbalance
from lora_cases import STREAM, R, lora_model, strategy_of, train_by_chance

ZERO = torch.zeros((), dtype=torch.float64)


def begun(tmp_path: Path, number: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    strategy, model = strategy_of("lora-moe", experts=2, **options), lora_model()
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, number))
    train_by_chance(model, 0, 0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    (handle,) = strategy.attach(model, optimizer)
    return strategy, model, handle


def test_every_layer_adds_its_experts_by_the_softmax_of_its_router_token_by_token(tmp_path: Path) -> None:
    strategy, model, handle = begun(tmp_path)
    routers: Routers = strategy._routers
    seen: list[tuple[Tensor, Tensor]] = []
    layers = list(lora_layers(model).values())
    hooks = [m.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for m in layers]
    ids = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        model(input_ids=ids)
        for number, (layer, (x, out)) in enumerate(zip(layers, seen, strict=True)):
            (a, b), gate = lora_factors(model)[number], routers.maps[number].double()
            for row in range(2):
                for token in range(6):
                    one = x[row, token]
                    weight = (gate @ one).exp() / (gate @ one).exp().sum()
                    expected = layer.base_layer.weight @ one
                    for n in range(2):
                        ranks = slice(n * R // 2, (n + 1) * R // 2)
                        # alpha over an expert's own rank, R / 2
                        expected = expected + 8.0 / (R / 2) * weight[n] * b[:, ranks] @ a[ranks] @ one
                    torch.testing.assert_close(out[row, token], expected, rtol=1e-5, atol=1e-6)
    for hook in hooks:
        hook.remove()
    handle.remove()


@pytest.mark.parametrize("kind", [0, 1])
def test_constraint_is_the_coefficient_of_variation_of_weighted_importance(kind: int) -> None:
    q = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [
        float(q[row, n]) * (1.3 if (n in (0, 1)) == (kind == 0) else 0.7)
        for row in range(3)
        for n in range(4)
    ]
    mean = sum(values) / 12
    variance = sum((v - mean) ** 2 for v in values) / 11
    assert float(imbalance(q, kind, 2, 0.3)) == pytest.approx(variance / mean**2, rel=1e-8)


def test_constraint_is_least_where_the_other_kinds_experts_have_more() -> None:
    even, less = torch.full((2, 4), 0.25), torch.tensor([[0.7, 0.7, 1.3, 1.3]] * 2) / 4
    assert float(imbalance(less, 0, 2, 0.3)) < 1e-6 < float(imbalance(even, 0, 2, 0.3))
    assert float(imbalance(even, 0, 2, 0.0)) < 1e-9, "without delta it balances all alike"


def test_loss_is_the_mean_constraint_of_the_layers_and_padding_does_not_count(tmp_path: Path) -> None:
    strategy, model, _ = begun(tmp_path, number=1, balance=0.5, delta=0.2)
    ids = torch.arange(10, 22).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    strategy.watch(model, {"attention_mask": mask})
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, args, out: seen.append(args[0]))
        for m in lora_layers(model).values()
    ]
    model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    terms = []
    for number, x in enumerate(seen):
        shares = (x @ strategy._routers.maps[number].double().T).softmax(-1)
        importance = torch.stack([shares[0, 2:].sum(0), shares[1].sum(0)])
        terms.append(imbalance(importance, 1, 2, 0.2))
    got, expected = strategy.loss(model, {}, None, ZERO), 0.5 * torch.stack(terms).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    got.backward()
    assert all(p.grad is not None and p.grad.any() for p in strategy._routers.parameters())


def test_routers_leave_the_model_after_a_task_and_come_back_for_the_next(tmp_path: Path) -> None:
    strategy, model, handle = begun(tmp_path)
    with torch.no_grad():
        for p in strategy._routers.parameters():
            p.add_(1.0)
    trained = {n: p.detach().clone() for n, p in strategy._routers.state_dict().items()}
    ids = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        handle.remove()
        strategy.end(context_of(model, tmp_path), stage_of(STREAM, 0))
        assert not hasattr(model, "lora_routers")
        routed = strategy.route(model, None)
        torch.testing.assert_close(routed(ids, torch.ones_like(ids)).logits, before)
        assert (model(input_ids=ids).logits - before).abs().max() > 1e-3
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    again = strategy._routers.state_dict()
    assert all(torch.equal(again[n], trained[n]) for n in trained)


def test_experts_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 ranks \(model\.lora\.r\) can't be divided among 3 experts"):
        strategy_of("lora-moe", experts=3, types=1).check(lora_model())
    with pytest.raises(ConfigError, match="can't be divided into 2 equal `types`"):
        validate(STRATEGIES["lora-moe"].Options, {"name": "lora-moe", "experts": 3}, "test")
    strategy_of("lora-moe").check(lora_model())
