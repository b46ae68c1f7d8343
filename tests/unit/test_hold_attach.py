"""Attaching mechanisms: what is found, what is refused, and what a summary says."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from torch import nn

from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold import (
    MECHANISMS,
    Anchor,
    Gate,
    GateOptions,
    MechanismOptions,
    Penalty,
    Project,
    build_mechanism,
)
from holdfast.hold.attach import unwrap
from holdfast.importance.prior import ImportancePrior
from small_network import backward, graded, network, weights
from zero_stand_in import MODULE, Zero2, Zero3


def test_attach_unwraps_the_optimizer_of_accelerate() -> None:
    model = network(torch.float32)
    before = weights(model)
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    accelerator = Accelerator(cpu=True)
    wrapped, optim = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    Gate(prior).attach(wrapped, optim)
    for _ in range(3):
        backward(model)
        optim.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_an_optimizer_of_deepspeed_that_no_hold_reaches_is_refused_by_name() -> None:
    stage = type("BF16_Optimizer", (), {"__module__": "deepspeed.runtime.bf16_optimizer"})()
    model = network()
    stage.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    with pytest.raises(ConfigError, match=r"BF16_Optimizer keeps .* Use ZeRO stage 1, 2 or 3"):
        Gate(prior).attach(model, stage)


@pytest.mark.parametrize("mechanism", [Anchor, Penalty])
def test_a_model_cast_after_attaching_is_refused_by_name_at_its_first_step(mechanism: Any) -> None:
    model = network(torch.float32)
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mechanism(prior).attach(model, optimizer)
    model.bfloat16()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = weights(model)
    with pytest.raises(
        ConfigError, match=r"was torch\.float32 when .* is torch\.bfloat16 now\. Cast the model"
    ):
        optimizer.step()
    if mechanism is Penalty:
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_fsdp1_is_refused_by_name() -> None:
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    model = wrapper(*network())
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    with pytest.raises(ConfigError, match=r"wrapped in FSDP1 .* Use FSDP2"):
        Gate(prior).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", [Zero2, Zero3])
def test_a_weight_that_two_hold_stays_held_when_one_lets_go(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", MODULE)
    model = network(torch.float32)
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    zero = kind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights(model)
    first, second = (Gate(prior).attach(model, zero) for _ in range(2))
    first.remove()
    backward(model)
    zero.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    second.remove()
    zero.step()
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_what_some_processes_alone_share_is_refused_by_name() -> None:
    model = network()
    zero = Zero2(model, torch.optim.SGD(model.parameters(), lr=0.1))
    zero.partition_count = [2]
    with pytest.raises(ConfigError, match=r"over \[2\] processes, not over all 1"):
        unwrap(zero)


@pytest.mark.parametrize("option", ["swap_optimizer", "zenflow"])
def test_zero_3_that_steps_elsewhere_is_refused_by_name(option: str) -> None:
    model = network()
    zero = Zero3(model, torch.optim.SGD(model.parameters(), lr=0.1))
    setattr(zero, option, True)
    with pytest.raises(ConfigError, match="steps where no hold reaches"):
        unwrap(zero)


def test_frozen_weights_are_skipped_but_no_weight_at_all_is_an_error() -> None:
    model = network()
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    last = model[2]
    assert isinstance(last, nn.Linear)
    Gate(prior).attach(model, torch.optim.SGD(last.parameters(), lr=0.1))
    with pytest.raises(PriorMismatchError, match="the optimizer holds none of the prior's 4 weights"):
        Gate(prior).attach(model, torch.optim.SGD(network().parameters(), lr=0.1))


def test_prior_that_does_not_fit_attaches_nothing() -> None:
    model = network()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    for mechanism in (Gate, Anchor, Penalty):
        with pytest.raises(PriorMismatchError, match=r"unexpected \(1\): 9.weight"):
            mechanism(ImportancePrior({"9.weight": torch.ones(2)})).attach(model, optim)
    short = {n: t for n, t in weights(model).items() if n != "2.bias"}
    for mechanism in (Anchor, Penalty):
        with pytest.raises(
            PriorMismatchError, match=r"reference weights don't fit the model: '2.bias' is miss"
        ):
            mechanism(graded(model), reference=short).attach(model, optim)
    assert not optim._optimizer_step_pre_hooks
    assert not optim._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda p: Gate(p, on="gradient"), "give on='update'"),
        (lambda p: Project(p, on="gradient"), "give on='update'"),
        (Penalty, "use the mechanism 'anchor'"),
    ],
    ids=["gate", "project", "penalty"],
)
def test_closure_is_refused_where_gradients_must_exist_before_the_step(make: Any, advice: str) -> None:
    model = network()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    make(graded(model)).attach(model, optim)
    with pytest.raises(ConfigError, match=rf"step\(closure\) computes gradients inside the step.*{advice}"):
        optim.step(lambda: 0.0)


def test_something_else_than_an_optimizer_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"got NoneType as optimizer; a torch.optim.Optimizer is needed"):
        Gate(graded(network())).attach(network(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantile": 0.1}, "`quantile` applies to `shape: soft` only, not to `paper`"),
        ({"shape": "soft", "fraction": 0.1}, "`fraction` applies to `shape: top` only, not to `soft`"),
        ({"shape": "top", "fraction": 1.5}, "less than or equal to 1"),
        ({"on": "loss"}, "'update' or 'gradient'"),
    ],
)
def test_gate_refuses_options_that_do_not_apply(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GateOptions(**values)
    with pytest.raises(ConfigError, match=message):
        Gate(graded(network()), **values)


@pytest.mark.parametrize("name", sorted(MECHANISMS))
def test_every_mechanism_is_a_word_in_the_config_and_has_a_summary(name: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(MechanismOptions)
    options = adapter.validate_python(name)
    assert adapter.validate_python(options.model_dump()) == options  # the resolved config can be read again
    model = network()
    prior = graded(model)
    mechanism = build_mechanism(options, prior, weights(model))
    assert isinstance(mechanism, MECHANISMS[name][1])
    mechanism.attach(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    summary = mechanism.summary()
    assert len(summary["histogram"]["edges"]) == 21
    assert sum(summary["histogram"]["counts"]) == prior.elements == summary["elements"]
    assert summary["histogram"]["edges"] == sorted(summary["histogram"]["edges"])
    assert 0 <= summary["held"] <= 1


def test_histogram_puts_values_where_they_belong() -> None:
    prior = ImportancePrior({"w": torch.tensor([-1.0, 0.0, 0.049, 0.051, 0.999, 1.0, 7.0])})
    summary = Gate(prior).summary()
    counts = summary["histogram"]["counts"]
    assert (counts[0], counts[1], counts[19]) == (3, 1, 3)
    assert summary["held"] == pytest.approx(2 / 7)


def test_summary_of_an_anchor_is_of_the_pull_once_the_learning_rate_is_known() -> None:
    model = network()
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    anchor = Anchor(prior, strength=10.0)
    before = anchor.summary()
    assert before["held"] is None
    assert (before["quantity"], before["mean"]) == ("pull per step / learning rate", pytest.approx(10.0))
    optim = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.optim.lr_scheduler.LambdaLR(optim, lambda step: step / 10)  # warm-up: the rate is 0 now
    anchor.attach(model, optim)
    after = anchor.summary()
    assert (after["quantity"], after["learning_rate"]) == ("pull per step", 0.05)
    assert after["mean"] == pytest.approx(0.5)
    assert after["histogram"]["counts"][10] == prior.elements
