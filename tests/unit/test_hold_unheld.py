"""What is trained and not held is said at attach, and what joins later at its first step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import holdfast
from holdfast.errors import ConfigError
from holdfast.hold import Anchor, Gate, Penalty, Project
from holdfast.hold.kept import Kept
from holdfast.hold.unheld import _HELD
from holdfast.importance.prior import ImportancePrior
from holdfast.models import tiny_llama
from holdfast.tasks import toy_tokenizer
from holdfast.training.verbs import Held
from small_network import backward, network, weights

MECHANISMS = {
    "gate": Gate,
    "anchor": lambda prior: Anchor(prior, strength=1e9),
    "penalty": lambda prior: Penalty(prior, strength=1e9),
    "project": lambda prior: Project(prior, share=1.0),
}
HOLDING = [name for name in MECHANISMS if name != "penalty"]


def ones(model: nn.Module, *names: str) -> ImportancePrior:
    return ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters() if n in names})


def sgd(model: nn.Module, *names: str) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for n, p in model.named_parameters() if n in names], lr=0.1)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    backward(model)
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_a_prior_does_not_rate_is_told_once_with_number_share_and_names(name: str) -> None:
    model = network()  # 15 + 5 + 10 + 2 weights
    optimizer = sgd(model, *dict(model.named_parameters()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        handle = MECHANISMS[name](ones(model, "0.weight", "0.bias")).attach(model, optimizer)
        step(model, optimizer)
        step(model, optimizer)
    (only,) = told
    said = rf"{name}: 2 trained tensors are not held, 37.5 % of the trained weights: 2.weight, 2.bias\."
    assert re.match(said, str(only.message))
    assert handle.not_held == ["2.weight", "2.bias"]


def test_where_all_that_is_trained_is_held_nothing_is_said() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = sgd(model, *dict(model.named_parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Gate(ones(model, "0.weight", "0.bias")).attach(model, optimizer)
        step(model, optimizer)


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("how", ["add_param_group", "unfrozen"])
def test_a_rated_weight_that_joins_later_is_held_from_its_first_step(name: str, how: str) -> None:
    model = network()
    every = list(dict(model.named_parameters()))
    if how == "unfrozen":
        model[2].requires_grad_(False)
    optimizer = sgd(model, *(every if how == "unfrozen" else ["0.weight", "0.bias"]))
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MECHANISMS[name](ones(model, *every)).attach(model, optimizer)
        step(model, optimizer)
        if how == "unfrozen":
            model[2].requires_grad_(True)
        else:
            optimizer.add_param_group({"params": model[2].parameters()})
        step(model, optimizer)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.fixture
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_sharded_weight_that_joins_later_is_held_from_its_first_step(
    name: str, process_group: None
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def trained(late: bool) -> dict[str, torch.Tensor]:
        model: Any = network()
        prior = ones(model, *dict(model.named_parameters()))
        before = weights(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters[:2] if late else parameters, lr=0.1)
        MECHANISMS[name](prior).attach(model, optimizer)
        if late:
            optimizer.add_param_group({"params": parameters[2:]})
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(4, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        now = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
        if name in HOLDING:
            assert all(torch.equal(before[n], value) for n, value in now.items())
        return now

    found = trained(late=True)
    for n, value in trained(late=False).items():
        torch.testing.assert_close(found[n], value)


@pytest.mark.parametrize("how", ["add_param_group", "unfrozen", "a module that is added"])
def test_an_unrated_weight_that_joins_later_is_told_at_its_first_step(how: str) -> None:
    model = network()
    if how == "unfrozen":
        model[2].requires_grad_(False)
    names = ["0.weight", "0.bias"] + (["2.weight"] if how == "unfrozen" else [])
    optimizer = sgd(model, *names)
    handle = Gate(ones(model, "0.weight", "0.bias")).attach(model, optimizer)
    if how == "unfrozen":
        model[2].requires_grad_(True)
    elif how == "add_param_group":
        optimizer.add_param_group({"params": [model[2].weight]})
    else:
        model.add_module("3", nn.Linear(2, 2).double())
        optimizer.add_param_group({"params": [model[3].weight]})
    name = "3.weight" if how.startswith("a module") else "2.weight"
    with pytest.warns(UserWarning, match=f"gate: from this step on, 1 trained tensor is not held.*: {name}"):
        step(model, optimizer)
    assert handle.not_held == [name]


def test_weights_that_a_second_optimizer_trains_are_told_unless_they_are_held_there_too() -> None:
    for both in (False, True):
        model = network()
        first, second = sgd(model, "0.weight", "0.bias"), sgd(model, "2.weight", "2.bias")
        prior = ones(model, *dict(model.named_parameters()))
        Gate(prior).attach(model, first)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if both:
                Gate(prior).attach(model, second)
            step(model, first, second)
            step(model, first, second)
        assert [str(w.message).split(", 37.5 %")[0] for w in told] == (
            [] if both else ["gate: by another optimizer, 2 trained tensors are not held"]
        )


@pytest.mark.parametrize("name", MECHANISMS)
def test_that_the_optimizer_of_a_hold_never_stepped_is_told_when_it_is_removed(name: str) -> None:
    model = network()
    names = list(dict(model.named_parameters()))
    attached, other = sgd(model, *names), sgd(model, *names)
    handle = MECHANISMS[name](ones(model, *names)).attach(model, attached)
    step(model, other)
    with pytest.warns(UserWarning, match=rf"{name}: 4 held tensors have changed, and step\(\) of the SGD"):
        handle.remove()
    handle = MECHANISMS[name](ones(model, *names)).attach(model, attached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.remove()  # nothing was trained


def test_a_removed_handle_says_and_holds_nothing_more() -> None:
    model = network()
    optimizer = sgd(model, "0.weight", "0.bias")
    Gate(ones(model, "0.weight", "0.bias")).attach(model, optimizer).remove()
    optimizer.add_param_group({"params": model[2].parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("mechanism", [Anchor, Gate, Penalty])
def test_what_was_rated_zero_is_told_as_not_held(mechanism: Any) -> None:
    model = network()
    tensors = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    tensors["2.weight"].zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"1 trained tensor was rated zero, and is not held: 2\.weight\."):
        handle = mechanism(ImportancePrior(tensors)).attach(model, optimizer)
    assert handle.not_held == ["2.weight"]


@pytest.mark.parametrize("dora", [True, False])
def test_factors_of_dora_are_told_to_be_held_in_part_only(
    dora: bool, recwarn: pytest.WarningsRecorder
) -> None:
    base = tiny_llama(toy_tokenizer(), hidden=16, layers=1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rows = [{"prompt": "copy ab=", "completion": "ab"}]
    importance = {"name": "inputs", "correct_only": False}
    prior = holdfast.attribute(model, toy_tokenizer(), rows, importance=importance, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    Anchor(prior, strength=1.0).attach(model, optimizer)
    told = [str(w.message) for w in recwarn if "factors of DoRA" in str(w.message)]
    assert len(told) == dora
    assert not dora or "lora_A" in told[0]


def own_rate(parameters: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=None, relative_step=True)


class ScheduleFree(torch.optim.SGD):
    """Has what tells such an optimizer from others."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize("kind", [own_rate, lambda p: ScheduleFree(p, lr=0.1)], ids=["own rate", "swaps"])
def test_an_anchor_that_is_refused_leaves_nothing_behind(kind: Any) -> None:
    model = network()
    prior = ones(model, *dict(model.named_parameters()))
    optimizer = kind(model.parameters())
    for _ in range(2):
        with pytest.raises(ConfigError):
            Anchor(prior).attach(model, optimizer)
    assert not any(_HELD.get(p, 0) for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert Kept("anchor", optimizer, prior.tensors).key.endswith("_0")


def test_where_one_of_several_holds_is_refused_none_is_attached() -> None:
    model = network()
    prior = ones(model, *dict(model.named_parameters()))
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError):
        Held(Gate(prior, on="gradient"), Anchor(prior)).attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(_HELD.get(p, 0) for p in model.parameters())
