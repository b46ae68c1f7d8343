"""Several holds on the same weights of one optimizer, and optimizers that call their parent's step."""

from __future__ import annotations

import copy
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


def held_at_once(model: nn.Module, optimizer: Any, every: int = 1, **options: Any) -> Any:
    """Pulls all the way back wherever it pulls."""
    return Anchor(of_ones(model), strength=1e6, every=every, **options).attach(model, optimizer)


def distances(model: nn.Module, optimizer: Any, start: dict[str, Tensor], steps: int) -> list[bool]:
    """Of each step, whether the weights were away from where they began after it."""
    return [
        any(not torch.equal(start[n], p) for n, p in trained(model, optimizer, 1).items())
        for _ in range(steps)
    ]


def test_each_of_two_anchors_counts_its_own_steps() -> None:
    model = model_of_maps()
    start = {n: p.detach().clone() for n, p in block_parameters(model).items()}
    optimizer = torch.optim.SGD(block_parameters(model).values(), lr=0.1)
    held_at_once(model, optimizer, every=2)
    Anchor(of_ones(model), strength=1e-9, every=2).attach(model, optimizer)
    assert distances(model, optimizer, start, 6) == [True, False] * 3


def test_a_state_that_has_waited_longer_than_every_pulls_at_the_next_step() -> None:
    model = model_of_maps()
    start = {n: p.detach().clone() for n, p in block_parameters(model).items()}
    optimizer = torch.optim.SGD(block_parameters(model).values(), lr=0.1)
    handle = held_at_once(model, optimizer, every=10, reference=start)
    trained(model, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    handle.remove()
    held_at_once(model, optimizer, every=4, reference=start)
    optimizer.load_state_dict(saved)
    assert distances(model, optimizer, start, 5) == [False, True, True, True, False]


def test_what_an_anchor_keeps_in_an_optimizer_goes_with_its_handle() -> None:
    model = model_of_maps()
    optimizer = torch.optim.AdamW(block_parameters(model).values(), lr=1e-2)
    before = set(optimizer.param_groups[0])
    pulls = []
    for _ in range(2):
        start = model_of_maps()
        model.load_state_dict(start.state_dict())
        anchor = Anchor(by_inputs(model), strength="auto", bound=0.1, every=2)
        handle = anchor.attach(model, optimizer)
        trained(model, optimizer)
        handle.remove()
        pulls.append(anchor.summary()["pull"])
        assert set(optimizer.param_groups[0]) == before
    assert pulls[1] == pulls[0] > 0


def test_a_state_that_was_loaded_before_a_handle_is_removed_is_the_next_ones() -> None:
    """A trainer whose training failed resumes with the same optimizer, on which the old hold still is."""
    model = model_of_maps()
    optimizer = torch.optim.AdamW(block_parameters(model).values(), lr=1e-2)
    start = {n: p.detach().clone() for n, p in block_parameters(model).items()}
    options: Any = {"strength": "auto", "bound": 0.1, "every": 2, "reference": start}
    handle = Anchor(by_inputs(model), **options).attach(model, optimizer)
    trained(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = trained(model, optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    handle.remove()
    Anchor(by_inputs(model), **options).attach(model, optimizer)
    assert all(torch.equal(expected[n], p) for n, p in trained(model, optimizer).items())


def test_two_models_of_one_optimizer_go_on_bit_for_bit_under_an_anchor_each() -> None:
    first, second = model_of_maps(), model_of_maps()
    starts = [{n: p.detach().clone() for n, p in block_parameters(m).items()} for m in (first, second)]
    priors = [by_inputs(first, 3), by_inputs(second, 4)]

    def begin(models: list[nn.Module]) -> Any:
        every = [p for m in models for p in block_parameters(m).values()]
        optimizer = torch.optim.AdamW(every, lr=1e-2)
        for model, prior, start in zip(models, priors, starts, strict=True):
            Anchor(prior, strength=50.0, reference=start).attach(model, optimizer)
        return optimizer

    def on(models: list[nn.Module], optimizer: Any, seed: int) -> None:
        for step in range(3):
            for number, model in enumerate(models):
                ids = torch.randint(
                    3, 10, (2, 8), generator=torch.Generator().manual_seed(seed + step + 50 * number)
                )
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = begin([first, second])
    on([first, second], optimizer, 0)
    saved = copy.deepcopy([first.state_dict(), second.state_dict(), optimizer.state_dict()])
    on([first, second], optimizer, 3)
    again = [model_of_maps(), model_of_maps()]
    for model, state in zip(again, saved[:2], strict=True):
        model.load_state_dict(state)
    other = begin(again)
    other.load_state_dict(saved[2])
    on(again, other, 3)
    for one, two in zip((first, second), again, strict=True):
        assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_a_weight_that_is_unfrozen_under_a_hold_in_coordinates_begins_its_moments_anew() -> None:
    model = model_of_maps()
    weights = block_parameters(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    trained(model, optimizer)
    late, other = list(weights.values())[:2]
    late.requires_grad_(False)
    Anchor(by_inputs(model), strength=1.0).attach(model, optimizer)
    trained(model, optimizer, 1)
    late.requires_grad_(True)
    trained(model, optimizer, 1)
    assert [int(optimizer.state[p]["step"]) for p in (late, other)] == [1, 2]
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    trained(model, optimizer, 1)
    late.requires_grad_(False)  # a script that goes on, and unfreezes it after the hold is attached again
    model.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    Anchor(by_inputs(model), strength=1.0).attach(model, optimizer)
    optimizer.load_state_dict(saved[1])
    late.requires_grad_(True)
    trained(model, optimizer, 1)
    assert [int(optimizer.state[p]["step"]) for p in (late, other)] == [2, 3]
