"""A weight that is frozen while it is held: its optimizer leaves it, and so does the hold."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.hold import Anchor, Gate, Penalty, Project
from holdfast.hold.directions import Directions
from holdfast.importance.prior import ImportancePrior
from holdfast.models import block_parameters, input_dims
from holdfast.strategies.kif.orthogonal import Orthogonality
from holdfast.strategies.osf.decomposed import Decomposed
from small_network import backward, network
from tiny_models import tiny_model
from zero_stand_in import MODULE, Zero2

MECHANISMS = {
    "anchor": lambda prior: Anchor(prior, strength=3.0),
    "gate": Gate,
    "gate, gradient": lambda prior: Gate(prior, on="gradient"),
    "penalty": lambda prior: Penalty(prior, strength=3.0),
    "project": lambda prior: Project(prior, share=0.5),
    "project, gradient": lambda prior: Project(prior, share=0.5, on="gradient"),
}
BY_INPUTS = MECHANISMS | {
    "anchor on the weights": lambda prior: Anchor(prior, strength=3.0, coordinates="weights"),
    "auto": lambda prior: Anchor(prior, strength="auto", bound=0.1),
    "auto on the weights": lambda prior: Anchor(prior, strength="auto", bound=0.1, coordinates="weights"),
}


def prior_of(model: nn.Module, kind: str) -> ImportancePrior:
    draw, weights = torch.Generator().manual_seed(0), block_parameters(model)
    if kind == "weights":
        return ImportancePrior({n: torch.rand(p.shape, generator=draw) for n, p in weights.items()})
    dims = input_dims(model)
    sides = {n: torch.randn((p.shape[dims[n]],) * 2, generator=draw) for n, p in weights.items()}
    return ImportancePrior({n: side @ side.T for n, side in sides.items()}, {"kind": "inputs"})


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
    ids = torch.arange(12).view(2, 6)
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def copies(weights: dict[str, Any]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in weights.items()}


@pytest.mark.parametrize(
    ("kind", "name"), [("weights", n) for n in MECHANISMS] + [("inputs", n) for n in BY_INPUTS]
)
def test_a_weight_that_is_frozen_while_it_is_held_stays_and_moves_again_when_it_is_not(
    kind: str, name: str
) -> None:
    model = tiny_model("llama")
    held = block_parameters(model)
    optimizer = torch.optim.AdamW(held.values(), lr=1e-2)
    BY_INPUTS[name](prior_of(model, kind)).attach(model, optimizer)
    steps(model, optimizer, 2)
    frozen = {n: p for n, p in held.items() if "layers.0" in n}
    for p in frozen.values():
        p.requires_grad_(False)
    before = copies(held)
    steps(model, optimizer, 3)
    assert {n for n, p in held.items() if torch.equal(before[n], p)} == set(frozen)
    for p in held.values():  # all of them: no fused call is left with anything to do
        p.requires_grad_(False)
    before = copies(held)
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in held.items())
    for p in held.values():
        p.requires_grad_(True)
    steps(model, optimizer, 2)
    assert not any(torch.equal(before[n], p) for n, p in held.items())


@pytest.mark.parametrize(
    ("kind", "name"), [("weights", n) for n in MECHANISMS] + [("inputs", n) for n in BY_INPUTS]
)
def test_a_weight_that_a_batch_does_not_use_is_held_with_no_gradient_as_with_zeros(
    kind: str, name: str
) -> None:
    def trained(zeros: bool) -> tuple[dict[str, Tensor], ...]:
        model = tiny_model("llama")
        held = block_parameters(model)
        first = copies(held)
        optimizer = torch.optim.SGD(held.values(), lr=1e-1)
        BY_INPUTS[name](prior_of(model, kind)).attach(model, optimizer)
        steps(model, optimizer, 2)
        unused = {n: p for n, p in held.items() if "layers.0" in n}
        before = copies(unused)
        for p in unused.values():
            p.grad = torch.zeros_like(p) if zeros else None
        for n in held.keys() - unused.keys():
            held[n].grad = torch.ones_like(held[n])
        optimizer.step()
        return first, before, copies(unused)

    first, before, after = trained(zeros=False)
    assert all(torch.equal(after[n], p) for n, p in trained(zeros=True)[2].items())
    if name in ("anchor", "anchor on the weights", "penalty"):  # the pull goes on, towards the first weights
        assert all((after[n] - first[n]).norm() < (before[n] - first[n]).norm() for n in after)


def test_a_pull_goes_on_from_where_a_weight_was_set_while_it_was_frozen() -> None:
    found = []
    for carried in (True, False):
        model = tiny_model("llama").double()
        held = block_parameters(model)
        optimizer = torch.optim.SGD(held.values(), lr=1e-2)
        coordinates: Any = "inputs" if carried else "weights"
        Anchor(prior_of(model, "inputs"), strength=3.0, coordinates=coordinates).attach(model, optimizer)
        first = next(iter(held.values()))
        steps(model, optimizer, 2)
        first.requires_grad_(False)
        steps(model, optimizer, 1)
        first.data.add_(0.1)
        steps(model, optimizer, 1)
        first.requires_grad_(True)
        steps(model, optimizer, 2)
        found.append(copies(held))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


def test_a_map_frozen_before_its_first_step_counts_with_the_change_that_it_has() -> None:
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        model = tiny_model("llama")
        held, prior = block_parameters(model), prior_of(model, "inputs")
        start = copies(held)
        optimizer = torch.optim.SGD(held.values(), lr=1.0)
        name = next(n for n in held if n.endswith("q_proj.weight"))
        with torch.no_grad():
            held[name].add_(0.01)
        anchor = Anchor(prior, strength="auto", bound=0.5, reference=start)
        handle = anchor.attach(model, optimizer)
        held[name].requires_grad_(False)
        steps(model, optimizer, 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(held[name], start[name] + 0.01)
    assert anchor.summary()["pull"] > 0
    on_weights = tiny_model("llama")
    weights = block_parameters(on_weights)
    with torch.no_grad():
        weights[name].add_(0.01)
    plain = torch.optim.SGD(weights.values(), lr=1.0)  # steps alike in every basis
    beside = Anchor(prior, strength="auto", bound=0.5, reference=start, coordinates="weights")
    other = beside.attach(on_weights, plain)
    weights[name].requires_grad_(False)
    steps(on_weights, plain, 3)
    assert anchor.summary()["pull"] == pytest.approx(beside.summary()["pull"], rel=1e-3)
    assert handle.drift().percent == pytest.approx(other.drift().percent, rel=1e-3)


@pytest.mark.parametrize("on", ["update", "gradient"])
def test_directions_through_all_weights_leave_a_frozen_one_too(on: Any) -> None:
    model = network()
    weights = dict(model.named_parameters())
    directions = Directions()
    directions.extend([{n: torch.randn(p.shape) for n, p in weights.items()}], 1)
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1)
    Project(directions, on=on).attach(model, optimizer)
    weights["0.weight"].requires_grad_(False)
    before = copies(weights)
    for _ in range(3):
        backward(model)
        optimizer.step()
    assert [n for n, p in weights.items() if torch.equal(before[n], p)] == ["0.weight"]


def test_orthogonality_leaves_a_frozen_factor() -> None:
    factors = {n: nn.Parameter(torch.rand(3, 2)) for n in ("a.lora_A.weight", "a.lora_B.weight")}
    optimizer = torch.optim.SGD(factors.values(), lr=0.1)
    Orthogonality(factors, 1.0).attach(nn.Module(), optimizer)
    factors["a.lora_A.weight"].requires_grad_(False)
    before = copies(factors)
    optimizer.step()
    assert [n for n, p in factors.items() if torch.equal(before[n], p)] == ["a.lora_A.weight"]


def test_a_frozen_weight_that_zero_steps_all_the_same_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", MODULE)
    model = network(torch.float32)
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    zero = Zero2(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    Anchor(prior, strength=1e9).attach(model, zero)
    before = copies(dict(model.named_parameters()))
    model[0].requires_grad_(False)  # type: ignore[operator]
    backward(model)
    zero.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_decomposition_leaves_a_frozen_factor() -> None:
    model = tiny_model("llama")
    decomposed = Decomposed(model, lambda name: 0.5)
    factors = {n: p for n, p in model.named_parameters() if n.endswith(("U_low", "V_low"))}
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2)
    decomposed.attach(model, optimizer)
    steps(model, optimizer, 1)
    some = next(iter(factors))
    factors[some].requires_grad_(False)
    before = copies(factors)
    steps(model, optimizer, 2)
    assert [n for n, p in factors.items() if torch.equal(before[n], p)] == [some]
