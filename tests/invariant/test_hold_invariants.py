"""What is fully held does not move by one bit, whatever the optimizer does around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import holdfast
from holdfast.hold import Anchor, Gate, tell_total_rate
from holdfast.importance.prior import ImportancePrior
from holdfast.tasks import toy_tokenizer
from learning_data import rows_of
from tiny_models import tiny_model

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def half_held(model: nn.Module) -> ImportancePrior:
    """Every second weight fully held, the others not at all."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = (torch.arange(parameter.numel()) % 2).float().view_as(parameter)
    return ImportancePrior(tensors)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 50,
    accumulate: int = 2,
    clip: float = 0.5,
) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        for _ in range(accumulate):
            x = torch.randn(4, 6, generator=generator).to(dtype)
            model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def split(model: nn.Module, prior: ImportancePrior) -> tuple[Tensor, Tensor]:
    held, free = [], []
    for name, parameter in model.named_parameters():
        mask = prior.tensors[name] > 0
        held.append(parameter.detach()[mask])
        free.append(parameter.detach()[~mask])
    return torch.cat(held), torch.cat(free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fully_gated_weight_is_bit_identical_and_the_others_move(optimizer: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    prior = half_held(model)
    held, free = split(model, prior)
    optim = OPTIMIZERS[optimizer](model.parameters())
    Gate(prior).attach(model, optim)
    train(model, optim)
    held_after, free_after = split(model, prior)
    assert torch.equal(held, held_after)
    assert (free != free_after).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fully_anchored_weight_is_bit_identical_and_the_others_move(
    optimizer: str, dtype: torch.dtype
) -> None:
    model = network(dtype)
    prior = half_held(model)  # held weights have I = 2 after normalisation
    held, free = split(model, prior)
    optim = OPTIMIZERS[optimizer](model.parameters())
    Anchor(prior, strength=50.0 if optimizer != "sgd" else 5.0).attach(model, optim)  # η·λ·I = 1
    train(model, optim)
    held_after, free_after = split(model, prior)
    assert torch.equal(held, held_after)
    assert (free != free_after).float().mean() > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ungated_weight_takes_the_very_step_of_the_unprotected_run(optimizer: str) -> None:
    plain, gated = network(), network()
    zero = ImportancePrior({n: torch.zeros_like(p) for n, p in gated.named_parameters()})
    plain_optim = OPTIMIZERS[optimizer](plain.parameters())
    gated_optim = OPTIMIZERS[optimizer](gated.parameters())
    Gate(zero).attach(gated, gated_optim)
    train(plain, plain_optim)
    train(gated, gated_optim)
    for a, b in zip(plain.parameters(), gated.parameters(), strict=True):
        assert torch.equal(a, b)


def test_removed_handle_leaves_the_optimizer_as_it_was() -> None:
    plain, gated = network(), network()
    optims = [OPTIMIZERS["adamw"](m.parameters()) for m in (plain, gated)]
    handle = Gate(half_held(gated)).attach(gated, optims[1])
    handle.remove()
    handle.remove()  # a second call is harmless
    train(plain, optims[0], steps=5)
    train(gated, optims[1], steps=5)
    for a, b in zip(plain.parameters(), gated.parameters(), strict=True):
        assert torch.equal(a, b)


def constant(model: nn.Module, value: float) -> ImportancePrior:
    return ImportancePrior({n: torch.full(p.shape, value) for n, p in model.named_parameters()})


def test_gate_on_gradient_cancels_under_adam() -> None:
    # Eq. 13 scales m by c and √v by c: with a vanishing epsilon the weights go where they would have gone.
    plain, gated = network(torch.float64), network(torch.float64)
    optims = [torch.optim.Adam(m.parameters(), lr=1e-2, eps=1e-30) for m in (plain, gated)]
    Gate(constant(gated, 0.9), on="gradient").attach(gated, optims[1])
    # no clipping and a loss whose gradients do not vanish
    for model, optim in zip((plain, gated), optims, strict=True):
        train(model, optim, steps=20, accumulate=1, clip=1e9)
    for a, b in zip(plain.parameters(), gated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gate_on_update_does_not_cancel_under_adam() -> None:
    plain, gated = network(torch.float64), network(torch.float64)
    start = copy.deepcopy(plain)
    optims = [torch.optim.Adam(m.parameters(), lr=1e-2, eps=1e-30) for m in (plain, gated)]
    Gate(constant(gated, 0.9)).attach(gated, optims[1])
    for model, optim in zip((plain, gated), optims, strict=True):
        train(model, optim, steps=1, accumulate=1, clip=1e9)
    for s, a, b in zip(start.parameters(), plain.parameters(), gated.parameters(), strict=True):
        torch.testing.assert_close(b - s, 0.1 * (a - s), rtol=1e-5, atol=1e-12)


def test_weight_decay_moves_a_weight_that_is_fully_gated_on_gradient() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optim = OPTIMIZERS["adamw"](model.parameters())
    Gate(constant(model, 1.0), on="gradient").attach(model, optim)
    train(model, optim, steps=3)
    for b, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), b * (1 - 1e-2 * 0.1) ** 3)


def test_bfloat16_gate_just_below_one_does_not_freeze() -> None:
    model = network(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    optim = torch.optim.SGD(model.parameters(), lr=1e3)
    Gate(constant(model, 0.9999)).attach(model, optim)  # bfloat16 would round it to 1
    train(model, optim, steps=1)
    assert all((b != p).any() for b, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{"pull": 5.0}, {"strength": "auto"}, {"pull": 5.0, "coordinates": "weights"}]
)
def test_saving_an_optimizer_without_a_state_moves_no_held_weight(options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    prior = holdfast.attribute(model, toy_tokenizer(), rows_of("may", 4), progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tell_total_rate(optimizer, None, steps=4)
    Anchor(prior, **options).attach(model, optimizer)
    model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    get_optimizer_state_dict(model, optimizer)  # torch steps at rate 0 there, to make a state
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
