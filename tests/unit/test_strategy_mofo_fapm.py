"""mofo and fapm: which entries of an update stay, against the same written out in double precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models import tiny_llama
from holdfast.runner import RunConfig
from holdfast.strategies.fapm import scores
from lora_cases import STREAM, TOKENIZER, lora_model, strategy_of
from small_network import backward, network, weights
from tiny_runs import tiny_run


def adam(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float) -> Tensor:
    """One step of AdamW (betas 0.9 and 0.999), in place for m and v; the new weights."""
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.999).add_(0.001 * g**2)
    w = w * (1 - lr * decay)
    return w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("updated", [0.15, 0.5, 1.0])
def test_mofos_steps_are_adams_filtered_by_momentum_written_out(updated: float) -> None:
    model, rate, decay = network(), 1e-2, 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    (handle,) = strategy_of("mofo", updated=updated).attach(model, optimizer)
    expected = weights(model)
    moments = {n: (torch.zeros_like(w), torch.zeros_like(w)) for n, w in expected.items()}
    for step in range(1, 6):
        gradients = backward(model, seed=step)
        optimizer.step()
        for name, before in expected.items():
            m, v = moments[name]
            after = adam(before, gradients[name], m, v, step, rate, decay)
            order = m.abs().flatten().argsort(descending=True)
            moves = torch.zeros(before.numel(), dtype=torch.bool)
            moves[order[: before.numel() - round((1 - updated) * before.numel())]] = True
            expected[name] = torch.where(moves.view_as(before), after, before)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)
    handle.remove()
    before = weights(model)
    backward(model)
    optimizer.step()
    assert all((p.detach() != before[n]).all() for n, p in model.named_parameters()), "the filter is off"


def test_held_weights_are_bit_identical_and_a_tensor_without_gradient_is_left_out() -> None:
    model: Any = network(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    strategy_of("mofo", updated=0.2).attach(model, optimizer)
    backward(model)
    model[2].weight.grad = None
    before = weights(model)
    optimizer.step()
    moved = {n: int((p.detach() != before[n]).sum()) for n, p in model.named_parameters()}
    assert moved == {"0.weight": 3, "0.bias": 1, "2.weight": 0, "2.bias": 0}


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_mofo_without_adams_moment_is_refused_with_the_configuration(optimizer: str, tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", strategy="mofo")
    values["training"] |= {"optimizer": optimizer}
    with pytest.raises(ConfigError, match=rf"`training\.optimizer: {optimizer}` .* use `optimizer: adamw`"):
        validate(RunConfig, values, "test")


def test_mofo_refuses_an_optimizer_of_ones_own_that_keeps_no_such_moment() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"which SGD doesn't keep as 'exp_avg'. Use torch's AdamW"):
        strategy_of("mofo").attach(model, torch.optim.SGD(model.parameters(), lr=1.0))

    class Packed(torch.optim.SGD):  # has betas, and its moments under another name
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=1.0)
            self.defaults["betas"] = (0.9, 0.999)

    optimizer = Packed(model.parameters())
    strategy_of("mofo").attach(model, optimizer)
    backward(model)
    with pytest.raises(ConfigError, match="which Packed doesn't keep as 'exp_avg'"):
        optimizer.step()


# fapm


def test_score_is_the_change_less_its_ratio_to_the_weight_times_the_mean_weight() -> None:
    before = torch.tensor([[1.0, -2.0, 0.5], [4.0, 0.0, -0.5]])
    change = torch.tensor([[0.1, 0.1, -0.1], [-0.4, 0.1, 0.0]])
    mean = (1 + 2 + 0.5 + 4 + 0 + 0.5) / 6
    expected = [
        [0.1 - mean * 0.1 / 1, 0.1 - mean * 0.1 / 2, 0.1 - mean * 0.1 / 0.5],
        [0.4 - mean * 0.4 / 4, -torch.inf, 0.0],
    ]
    torch.testing.assert_close(scores(before, change), torch.tensor(expected))


@given(seed=st.integers(0, 100), pruned=st.sampled_from([0.0, 0.5, 0.9]))
@settings(max_examples=10, deadline=None)
def test_fapm_takes_back_exactly_the_entries_of_lowest_score(
    seed: int, pruned: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fapm")
    strategy, model = strategy_of("fapm", pruned=pruned), tiny_llama(TOKENIZER, hidden=16, layers=1).double()
    context, stage = context_of(model, folder), stage_of(STREAM, 0)
    strategy.begin(context, stage)
    before, draw = weights(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    trained = weights(model)
    strategy.end(context, stage)
    energy = [0.0, 0.0]
    for name, p in model.named_parameters():
        was, now = before[name], trained[name]
        change = now - was
        score = change.abs() - was.abs().mean() * change.abs() / was.abs()
        count = round(pruned * p.numel())
        if p.dim() == 1:  # norms, all 1: they tie
            count = p.numel() if count else 0
        gone = torch.zeros(p.numel(), dtype=torch.bool)
        gone[score.flatten().argsort()[:count]] = True
        expected = torch.where(gone.view_as(p), was, now)
        assert torch.equal(p.detach(), expected), name
        assert int((p.detach() == was).sum()) == count
        energy[0] += float((p.detach() - was).square().sum())
        energy[1] += float(change.square().sum())
    said = json.loads((folder / "pruning.json").read_text())
    assert said["pruned"] == pruned
    assert said["energy_left"] == pytest.approx(energy[0] / energy[1], rel=1e-4)


def test_fapm_refuses_lora() -> None:
    with pytest.raises(ConfigError, match=r"leave out model\.lora"):
        strategy_of("fapm").check(lora_model())
    strategy_of("fapm").check(nn.Linear(2, 2))
