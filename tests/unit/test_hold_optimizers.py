"""Optimizers and values under which a hold would be lost without a word: refused, or right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor, AdafactorSchedule

from holdfast.errors import ConfigError
from holdfast.hold import Anchor, Gate, Penalty, Project, tell_total_rate
from holdfast.importance.prior import ImportancePrior
from small_network import backward, graded, network, weights


class ScheduleFree(torch.optim.SGD):
    """What schedule-free optimizers have and no others do; they interpolate weights in these."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize("mechanism", [Gate, Anchor, Project])
def test_an_optimizer_that_swaps_weights_is_refused_where_it_would_undo_the_hold(mechanism: Any) -> None:
    model = network()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"ScheduleFree trains one set of .* mechanism that changes grad"):
        mechanism(graded(model)).attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("make", [lambda p: Gate(p, on="gradient"), Penalty], ids=["gate", "penalty"])
def test_what_is_advised_for_such_an_optimizer_works(make: Any) -> None:
    model = network()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    make(graded(model)).attach(model, optimizer)
    backward(model)
    optimizer.step()


@pytest.mark.parametrize("scheduled", [False, True])
def test_adafactor_with_a_rate_of_its_own_is_refused_and_what_is_advised_works(scheduled: bool) -> None:
    model = network(torch.float32)
    optimizer = Adafactor(model.parameters())
    scheduler = AdafactorSchedule(optimizer) if scheduled else None
    tell_total_rate(optimizer, scheduler, 10)
    with pytest.raises(ConfigError, match=r"anchor: Adafactor makes a learning rate of its own"):
        Anchor(graded(model)).attach(model, optimizer)
    fixed = Adafactor(model.parameters(), lr=0.1, relative_step=False)
    mechanisms: list[tuple[Anchor | Gate, Any]] = [
        (Anchor(graded(model)), fixed),
        (Gate(graded(model)), optimizer),
    ]
    for mechanism, stepped in mechanisms:
        handle = mechanism.attach(model, stepped)
        backward(model)
        stepped.step()
        handle.remove()


def test_float16_pull_beyond_its_range_is_the_pull_of_float32() -> None:
    values = {n: torch.full(p.shape, 1e-4) for n, p in network().named_parameters()}
    values["0.weight"][0, 0] = 0.0  # with λ·I infinite, 0 · inf would be NaN at a rate of 0
    values["0.weight"][0, 1] = 30.0
    moved = {}
    for dtype in (torch.float16, torch.float32):
        model = network(torch.float16).to(dtype)
        before = weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        Anchor(ImportancePrior(values), strength=3e3).attach(model, optimizer)
        assert max(v.mean() for v in values.values()) > 0
        for rate in (0.5, 0.0):
            optimizer.param_groups[0]["lr"] = rate
            for n, p in model.named_parameters():
                p.grad = torch.full_like(p, 0.25 if n == "0.weight" else 0.0)
            optimizer.step()
        moved[dtype] = model[0].weight.detach().float() - before["0.weight"].float()
    assert torch.isfinite(moved[torch.float16]).all()
    assert moved[torch.float16][0, 1] == moved[torch.float32][0, 1] == 0
    assert torch.allclose(moved[torch.float16], moved[torch.float32], atol=1e-3)
    assert moved[torch.float16][0, 0] < -0.1  # what isn't rated moves


def test_top_gate_holds_nothing_of_a_tensor_without_importance() -> None:
    prior = ImportancePrior({"a": torch.zeros(40), "b": torch.tensor([0.0, -1.0, 2.0, 1.0])})
    held = dict(Gate(prior, shape="top", fraction=0.75).held())
    assert held["a"].sum() == 0
    assert held["b"].tolist() == [0, 0, 1, 1]
