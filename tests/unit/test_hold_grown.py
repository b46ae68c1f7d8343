"""Frozen ranks stay bit for bit, and the new ones are trained as a LoRA of their own would be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.models import LoraOptions, add_lora, tiny_llama
from holdfast.models.adapters import grow, lora_factors, lora_layers, rank_of
from holdfast.records import AdapterRanks
from holdfast.strategies.lora.grown import Grown
from holdfast.tasks import toy_tokenizer

TOKENIZER = toy_tokenizer()


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    """A LoRA of rank 2 with trained-looking factors, in double precision where steps are compared."""
    base = tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2).to(dtype)
    model = add_lora(base, LoraOptions(r=2)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for _, b in lora_factors(model):
            b.normal_(std=0.3)
    return model


def adafactor(parameters: Any) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": adafactor,
}


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: Any, number: int = 0) -> None:
    ids = (torch.arange(24).view(2, 12) * (number + 3)) % len(TOKENIZER)
    model(input_ids=ids, labels=ids).loss.backward()


def copies(parts: list[Tensor]) -> list[Tensor]:
    return [part.detach().clone() for part in parts]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_frozen_ranks_are_bit_identical_whatever_the_optimizer_and_its_weight_decay(name: str) -> None:
    model = model_of()
    grown = Grown.for_task(model, task=1, seed=0)
    old, new = copies([*grown.old_a(), *grown.old_b()]), copies([*grown.new_a(), *grown.new_b()])
    optimizer = OPTIMIZERS[name](trained(model))
    grown.attach(model, optimizer)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert same(old, [*grown.old_a(), *grown.old_b()])
    moved = [not torch.equal(a, b) for a, b in zip(new, [*grown.new_a(), *grown.new_b()], strict=True)]
    assert all(moved)


def test_without_the_mechanism_the_frozen_ranks_would_move() -> None:
    model = model_of()
    grown = Grown.for_task(model, task=1, seed=0)
    old = copies(grown.old_a())
    optimizer = OPTIMIZERS["adamw"](trained(model))
    grown.attach(model, optimizer).remove()  # a removed handle holds nothing
    backward(model)
    assert all(bool(a.grad[:2].any()) for a, _ in grown.factors)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(old, grown.old_a(), strict=True))


def separate_of(model: Any) -> Any:
    """The same model with the ranks from the third on in a second adapter, and the first one frozen."""
    apart = model_of(torch.float64)
    apart.add_adapter("new", apart.peft_config["default"])
    apart.base_model.set_adapter(["default", "new"])
    parts = zip(lora_factors(apart), lora_factors(apart, "new"), lora_factors(model), strict=True)
    for first, second, whole in parts:
        with torch.no_grad():
            first.a.copy_(whole.a[:2])
            first.b.copy_(whole.b[:, :2])
            second.a.copy_(whole.a[2:])
            second.b.copy_(whole.b[:, 2:])
        first.a.requires_grad_(False)
        first.b.requires_grad_(False)
    return apart.eval()


@pytest.mark.parametrize("clip", [1e-3, 1e9])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_new_ranks_take_the_steps_of_a_separate_adapter_clipping_included(name: str, clip: float) -> None:
    """Three steps of two micro-batches each; the clipped norm is that of the new LoRA alone."""
    model = model_of(torch.float64)
    grown = Grown.for_task(model, task=1, seed=0)
    apart = separate_of(model)
    runs = [(m, OPTIMIZERS[name](trained(m))) for m in (model, apart)]
    grown.attach(runs[0][0], runs[0][1])
    for step in range(3):
        norms = []
        for each, optimizer in runs:
            for part in range(2):  # accumulation
                backward(each, 2 * step + part)
            norms.append(torch.nn.utils.clip_grad_norm_(trained(each), clip))
            optimizer.step()
            optimizer.zero_grad()
        assert norms[1] > 1e-2
        torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
    for whole, part in zip(lora_factors(model), lora_factors(apart, "new"), strict=True):
        torch.testing.assert_close(whole.a[2:], part.a, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(whole.b[:, 2:], part.b, rtol=1e-7, atol=1e-10)


def test_gradient_that_overflows_in_a_frozen_rank_does_not_reach_it() -> None:
    model = model_of()
    grown = Grown.for_task(model, task=1, seed=0)
    optimizer = OPTIMIZERS["sgd"](trained(model))
    grown.attach(model, optimizer)
    layer, a = next(iter(lora_layers(model).values())), grown.factors[0].a
    out = layer.lora_A["default"](torch.ones(1, a.shape[1]))
    (out * torch.where(torch.arange(4) < 2, torch.inf, 1.0)).sum().backward()
    assert a.grad is not None
    assert a.grad[:2].eq(0).all()
    assert a.grad[2:].eq(1).all()


def test_first_task_trains_the_ranks_that_are_there_and_touches_nothing() -> None:
    model = model_of()
    before = [id(p) for p in trained(model)]
    grown = Grown.for_task(model, task=0, seed=0)
    assert grown.summary() == AdapterRanks(rank=2, frozen=0)
    assert [id(p) for p in trained(model)] == before
    optimizer = OPTIMIZERS["adamw"](trained(model))
    assert not grown.attach(model, optimizer).removers
    assert not optimizer._optimizer_step_post_hooks


def test_handle_undoes_the_attachment() -> None:
    model = model_of()
    grow(model, 2, seed=0)
    grown = Grown(model, frozen=2)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    handle = grown.attach(model, optimizer)
    assert optimizer._optimizer_step_post_hooks
    handle.remove()
    handle.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert all(not p._backward_hooks for pair in grown.factors for p in pair)
    assert rank_of(model) == 4


def test_an_optimizer_that_is_refused_leaves_the_layers_as_they_were() -> None:
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    model = model_of()
    grown = Grown.for_task(model, task=1, seed=0)
    with pytest.raises(ConfigError, match="swaps"):
        grown.attach(model, ScheduleFree(trained(model), lr=0.1))
    assert not [layer for layer in model.modules() if "forward" in vars(layer)]
