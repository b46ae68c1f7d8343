"""A step that fails inside leaves a model that is held in the coordinates of inputs as it was."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import ConfigError
from holdfast.hold import Anchor, tell_total_rate
from holdfast.importance.prior import ImportancePrior

NAMES = ("h.0.weight", "h.1.weight")


class Net(nn.Module):
    """Linear maps one after another, in "blocks"."""

    def __init__(self, *sizes: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = itertools.pairwise(sizes)
        self.h = nn.ModuleList([nn.Linear(i, o, bias=bias) for i, o in pairs])

    def forward(self, x: Any) -> Any:
        for each in self.h:
            x = each(x)
        return x


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return Net(6, 5, 3).to(dtype)


def prior_of(rank: int | None = None) -> ImportancePrior:
    torch.manual_seed(1)
    tensors, meta = {}, {"kind": "inputs", "importance": "inputs", "free": ["h.0.bias", "h.1.bias"]}
    for name, size in zip(NAMES, (6, 5), strict=True):
        x = torch.randn(size, 2 * size)
        tensors[name] = x @ x.T
    prior = ImportancePrior(tensors, meta)
    return prior if rank is None else prior.leading(rank)


def gradient(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(7, 6).to(next(model.parameters()).dtype)
    model(x).float().square().mean().backward()


class Failing(torch.optim.AdamW):
    """Raises in the middle of its step when it is told to."""

    failure: BaseException | None = None
    late = False

    def step(self, closure: Any = None) -> Any:
        if self.failure is not None and self.late:
            super().step(closure)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return super().step(closure)


def held(model: nn.Module, prior: ImportancePrior) -> Failing:
    optimizer = Failing(model.parameters(), lr=1e-2)
    Anchor(prior, strength=3.0).attach(model, optimizer)
    for seed in (1, 2):
        take(model, optimizer, seed)
    return optimizer


def take(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    gradient(model, seed)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()], ids=["memory", "ctrl-c"]
)
def test_weights_and_gradients_are_as_before_and_the_step_can_be_made_again(
    failure: BaseException, rank: int | None, dtype: torch.dtype
) -> None:
    model, other = network(dtype), network(dtype)
    optimizer, unbroken = held(model, prior_of(rank)), held(other, prior_of(rank))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    gradient(model, 3)
    optimizer.failure = failure
    with pytest.raises(type(failure)):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.step()  # with the very gradients
    take(model, optimizer, 4)
    for seed in (3, 4):
        take(other, unbroken, seed)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)


def test_where_the_step_was_done_when_it_failed_nothing_is_left_turned() -> None:
    model = network()
    optimizer = held(model, prior_of())
    start = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    gradient(model, 3)
    optimizer.failure, optimizer.late = RuntimeError("late"), True
    with pytest.raises(RuntimeError, match="late"):
        optimizer.step()
    for p, q in zip(model.parameters(), start, strict=True):
        assert (p - q).abs().max() < 0.05  # a turned weight is an order away


def test_a_missing_sum_of_rates_is_told_before_the_step_moves_anything() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = Anchor(prior_of()).attach(model, optimizer)
    for _ in range(2):
        with pytest.raises(ConfigError, match="sum of its learning rates is not known"):
            take(model, optimizer, 1)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    tell_total_rate(optimizer, None, 4)
    take(model, optimizer, 1)
    handle.remove()
    again = network()
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    tell_total_rate(fresh, None, 4)
    Anchor(prior_of()).attach(again, fresh)
    take(again, fresh, 1)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_schedulers_and_copies_find_the_step_that_they_expect(when: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = []
        if when != "after":
            schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        mark = vars(optimizer).get("step")
        handle = Anchor(prior_of(), strength=3.0).attach(model, optimizer)
        if when != "before":
            schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        take(model, optimizer, 1)
        for scheduler in schedulers:
            scheduler.step()
        copied = copy.deepcopy(optimizer)
        assert "step" not in vars(copied)
        handle.remove()
        take(model, optimizer, 2)
    if when == "before":
        assert optimizer.step is mark
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9 ** len(schedulers))


def test_an_optimizer_that_was_held_is_freed_with_its_last_name() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = Anchor(prior_of(), strength=3.0).attach(model, optimizer)
    take(model, optimizer, 1)
    handle.remove()
    assert "step" not in vars(optimizer)
    freed = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, handle
        assert freed() is None
    finally:
        gc.enable()


def test_weights_that_are_added_to_the_optimizer_are_pulled_as_strongly_as_the_others() -> None:
    one, two = network(), network()
    for model, later in ((one, False), (two, True)):
        weights: Any = list(model.parameters())
        optimizer = torch.optim.SGD(weights[:2] if later else weights, lr=1e-2)
        tell_total_rate(optimizer, None, 4)
        Anchor(prior_of()).attach(model, optimizer)
        if later:
            optimizer.add_param_group({"params": weights[2:]})
        for seed in (1, 2, 3):
            take(model, optimizer, seed)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64), (7, 7)])
@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_weights_that_are_halved_or_negated_between_steps_are_gone_on_from(
    factor: float, size: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Net(*size, bias=False).to(dtype)
    x = torch.randn(size[0], 90)
    prior = ImportancePrior({"h.0.weight": x @ x.T}, {"kind": "inputs", "importance": "inputs"})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    Anchor(prior, strength=0.001).attach(model, optimizer)
    weight: Any = model.h[0].weight
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    with torch.no_grad():
        weight.mul_(factor)
    wanted = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), wanted, rtol=2e-2, atol=2e-3)
