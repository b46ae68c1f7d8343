"""A hold that holds almost nothing says so, and what is advised there holds."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from holdfast.errors import ConfigError
from holdfast.hold import Anchor, Gate, Penalty, tell_total_rate
from holdfast.hold.schedule import total_rate_of
from holdfast.importance.prior import ImportancePrior
from small_network import graded, network


def fisher(size: float = 1e-7) -> ImportancePrior:
    values = graded(network(), 0.0, 2 * size)
    return ImportancePrior(values.tensors, {"importance": "fisher"})


def said(mechanism: Any, steps: int | None = 100) -> list[str]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if steps is not None:
        tell_total_rate(optimizer, None, steps)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mechanism.attach(model, optimizer)
    return [str(warning.message) for warning in told]


def test_a_gate_on_values_far_below_one_says_so_and_what_it_advises_holds() -> None:
    (message,) = said(Gate(fisher()))
    assert re.match(r"gate: it holds 1e-07 of each step, .* the values of 'fisher' are far below 1", message)
    for advised in (Gate(fisher(), shape="soft"), Gate(fisher(), shape="top")):
        assert said(advised) == []
    assert said(Gate(fisher().mean_normalised())) == []


@pytest.mark.parametrize("steps", [100, None], ids=["told", "not told"])
@pytest.mark.parametrize("make", [Penalty, lambda p, **s: Anchor(p, **s)], ids=["penalty", "anchor"])
def test_a_pull_that_pulls_nothing_says_so_with_a_strength_that_does(make: Any, steps: int | None) -> None:
    weak = {"strength": 3e3 if make is Penalty else 1e-3}
    (message,) = said(make(fisher(), **weak), steps)
    advised = re.search(r"is almost nothing. strength=(\S+) is a whole pull of 5", message)
    assert advised is not None
    assert said(make(fisher(), strength=float(advised[1])), steps) == []


def test_the_advised_strength_means_the_same_whatever_the_size_of_the_importance() -> None:
    found = []
    for size in (1e-7, 1e-4):
        (message,) = said(Penalty(fisher(size), strength=1e-9 / size))
        found.append(float(re.search(r"strength=(\S+) is a whole", message)[1]) * size)  # type: ignore[index]
    assert found[0] == pytest.approx(found[1], rel=0.2)  # one digit is shown


@pytest.mark.parametrize("size", [1e-7, 1e-2])
def test_a_penalty_s_pull_means_the_same_whatever_the_size_of_the_importance(size: float) -> None:
    """Under SGD, without a gradient of its own, a weight of mean importance keeps exp(-pull) of its way."""
    values = {n: torch.full_like(t, size) for n, t in fisher().tensors.items()}
    model = network()
    reference = {n: p.detach().clone() for n, p in model.named_parameters() if n in values}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    tell_total_rate(optimizer, None, 100)
    Penalty(ImportancePrior(values), pull=2.0, reference=reference).attach(model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, before in reference.items():
        left = dict(model.named_parameters())[name].detach() - before
        assert torch.allclose(left, torch.full_like(left, (1 - 2.0 / 100) ** 100), rtol=1e-3), name


def test_a_penalty_s_pull_needs_the_rates_and_no_strength_beside_it() -> None:
    with pytest.raises(ConfigError, match="sum of its learning rates is not known"):
        said(Penalty(fisher(), pull=5.0), steps=None)
    with pytest.raises(ConfigError, match="not both"):
        Penalty(fisher(), pull=5.0, strength=1.0)


def test_a_prior_that_rates_nothing_says_so() -> None:
    nothing = ImportancePrior({n: torch.zeros_like(t) for n, t in fisher().tensors.items()})
    for mechanism in (Gate(nothing), Penalty(nothing), Anchor(nothing)):
        assert len(said(mechanism)) == 1


@pytest.mark.parametrize("steps", [100, None], ids=["told", "not told"])
def test_of_weights_that_no_row_depends_on_it_is_said_that_nothing_was_rated(steps: int | None) -> None:
    """Such as the trained embeddings of tokens that old rows don't have."""
    nothing = ImportancePrior({n: torch.zeros_like(t) for n, t in fisher().tensors.items()})
    for mechanism in (Penalty(nothing), Anchor(nothing)):
        (message,) = said(mechanism, steps)
        assert re.search(
            r"none of the weights .* an importance above 0 \(.*weight.*none has these tokens", message
        )
        assert "0 %" not in message


def test_what_holds_says_nothing() -> None:
    for mechanism in (Anchor(fisher()), Penalty(fisher(), strength=1e9), Penalty(fisher(), strength=0)):
        assert said(mechanism) == []


def test_the_sum_of_rates_is_known_of_schedulers_made_of_others() -> None:
    from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LinearLR

    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    scheduler = ChainedScheduler([LinearLR(optimizer, 0.5, total_iters=3), ExponentialLR(optimizer, 0.9)])
    tell_total_rate(optimizer, scheduler, 5)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    told = optimizer.param_groups[0]["holdfast_total_rate"]
    assert told == pytest.approx(sum(rates))
    tell_total_rate(optimizer, scheduler, 5)  # of one that has moved, what is there stays
    assert optimizer.param_groups[0]["holdfast_total_rate"] == told


@pytest.mark.parametrize("first", [0.0, 0.2])
def test_weights_that_join_late_are_pulled_in_proportion_to_a_group_that_moves(first: float) -> None:
    model = network()
    one, two, *late = model.parameters()
    groups = [{"params": [one], "lr": first}, {"params": [two], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    tell_total_rate(optimizer, None, 10)
    optimizer.add_param_group({"params": late, "lr": 0.05})
    assert total_rate_of(optimizer.param_groups[2], optimizer) == pytest.approx(0.5)
