"""Gradients of single samples from a training step: what can't be told apart by sample is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from attribution_models import build, with_module_experts
from holdfast.errors import ConfigError
from holdfast.importance.sample_squares import SampleSquares
from holdfast.models import block_parameters


def squares(model, parameters, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = SampleSquares(model, parameters)
    try:
        found.begin(labels)
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        return {name: value.clone() for name, value in found.finish().items()}
    finally:
        found.remove()


def step() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :3] = -100
    return ids, labels


def test_rows_of_experts_that_are_modules_are_not_taken_for_samples() -> None:
    model, (ids, labels) = with_module_experts(5), step()
    parameters = {name: p for name, p in block_parameters(model).items() if "experts" in name}
    with pytest.raises(ConfigError, match=r"'second' needs .*experts.* of the 2 samples .*'second-batch'"):
        squares(model, parameters, ids, labels)
    squares(model, parameters, ids[:1], labels[:1])


@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT's MLP gets the tokens of all samples in a row
def test_squares_of_a_step_are_those_of_its_samples_alone(family: str) -> None:
    model, (ids, labels) = build(family), step()
    parameters = block_parameters(model)
    together = squares(model, parameters, ids, labels)
    alone = [squares(model, parameters, ids[i : i + 1], labels[i : i + 1]) for i in range(2)]
    for name, value in together.items():
        expected = alone[0][name] + alone[1][name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=max(1e-8 * float(expected.max()), 1e-30))
