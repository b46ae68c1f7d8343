"""Several holds on the same weights of one optimizer, and optimizers that call their parent's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.hold import Anchor, Gate, Penalty, Project, tell_total_rate
from holdfast.importance.prior import ImportancePrior
from holdfast.models import block_parameters, input_sizes
from tiny_models import tiny_model

INPUTS = {"kind": "inputs"}


def model_of_maps() -> nn.Module:
    model = tiny_model("llama")
    maps = list(block_parameters(model).values())
    model.requires_grad_(False)
    for weight in maps:
        weight.requires_grad_(True)
    return model


def by_inputs(model: nn.Module, seed: int = 3) -> ImportancePrior:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(size, size, generator=generator) for name, size in input_sizes(model).items()}
    return ImportancePrior({n: x @ x.T / len(x) for n, x in drawn.items()}, INPUTS)


def of_ones(model: nn.Module) -> ImportancePrior:
    return ImportancePrior({n: torch.ones(p.shape) for n, p in block_parameters(model).items()})


def free_in_its_basis(model: nn.Module) -> Anchor:
    """It turns weights and gradients for each step, and pulls nothing."""
    return Anchor(by_inputs(model), strength=0)


def trained(model: nn.Module, optimizer: Any, steps: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        ids = torch.randint(3, 10, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in block_parameters(model).items()}


def under(makes: list[Callable[[nn.Module], Any]], kind: Any = torch.optim.AdamW) -> dict[str, Tensor]:
    model = model_of_maps()
    optimizer = kind(block_parameters(model).values(), lr=1e-2)
    tell_total_rate(optimizer, None, 3)
    for make in makes:
        make(model).attach(model, optimizer)
    return trained(model, optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: Gate(of_ones(m)),
        lambda m: Anchor(of_ones(m), strength=1e9),
        lambda m: Project(ImportancePrior({n: torch.eye(s) for n, s in input_sizes(m).items()}, INPUTS)),
    ],
    ids=["gate", "anchor", "project"],
)
@pytest.mark.parametrize("turned_first", [True, False])
def test_what_is_held_fully_stays_beside_a_hold_that_steps_in_a_basis(make: Any, turned_first: bool) -> None:
    before = {n: p.detach().clone() for n, p in block_parameters(model_of_maps()).items()}
    makes = [free_in_its_basis, make] if turned_first else [make, free_in_its_basis]
    after = under(makes)
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, atol=1e-6), name
    moved = under([free_in_its_basis])
    assert not any(torch.allclose(moved[n], weight, atol=1e-3) for n, weight in before.items())


def test_holds_of_one_optimizer_act_alike_in_whatever_order_they_are_attached() -> None:
    def penalty(model: nn.Module) -> Any:
        return Penalty(of_ones(model), strength=100)

    def gate(model: nn.Module) -> Any:
        return Gate(of_ones(model), shape="soft", quantile=0.5)

    orders = [[penalty, gate, free_in_its_basis], [free_in_its_basis, penalty, gate]]
    one, other = (under(makes) for makes in orders)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_hook_of_ones_own_sees_the_weights_themselves() -> None:
    model = model_of_maps()
    optimizer = torch.optim.AdamW(block_parameters(model).values(), lr=1e-2)
    seen: dict[str, Tensor] = {}

    def follow(*_: Any) -> None:
        seen.update({n: p.detach().clone() for n, p in block_parameters(model).items()})

    optimizer.register_step_post_hook(follow)  # such as a running mean of the weights
    free_in_its_basis(model).attach(model, optimizer)
    after = trained(model, optimizer)
    for name, weight in after.items():
        assert torch.equal(seen[name], weight), name


def test_a_second_basis_for_a_weight_is_refused_and_what_is_advised_works() -> None:
    model = model_of_maps()
    optimizer = torch.optim.AdamW(block_parameters(model).values(), lr=1e-2)
    tell_total_rate(optimizer, None, 3)
    may, june = by_inputs(model, 1), by_inputs(model, 2)
    first = Anchor(may).attach(model, optimizer)
    with pytest.raises(ConfigError, match=r"another prior of the kind 'inputs' already.*merge\(second"):
        Anchor(june).attach(model, optimizer)
    Anchor(june, coordinates="weights").attach(model, optimizer).remove()
    first.remove()
    Anchor(may.mean_normalised().merge(june.mean_normalised())).attach(model, optimizer).remove()
    two = model_of_maps()  # another model's weights have a basis of their own
    optimizer.add_param_group({"params": list(block_parameters(two).values())})
    tell_total_rate(optimizer, None, 3)
    for each in (model, two):
        Anchor(may).attach(each, optimizer)


class CallsItsParent(torch.optim.AdamW):
    """As many optimizers of people's own do; torch then calls the hooks of both steps."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: Anchor(of_ones(m), strength=20),
        lambda m: Anchor(of_ones(m), strength=20, every=2),
        lambda m: Anchor(by_inputs(m)),
        lambda m: Anchor(by_inputs(m), coordinates="weights"),
        lambda m: Gate(of_ones(m), shape="soft", quantile=0.5),
        lambda m: Gate(of_ones(m), shape="soft", quantile=0.5, on="gradient"),
        lambda m: Penalty(of_ones(m), strength=100),
    ],
    ids=["anchor", "every", "inputs", "inputs-weights", "gate", "gate-gradient", "penalty"],
)
def test_a_step_that_calls_its_parents_is_held_once(make: Any) -> None:
    one, other = under([make]), under([make], CallsItsParent)
    for name in one:
        assert torch.equal(one[name], other[name]), name
