"""Controls keep the amount of protection and change who gets it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigError
from holdfast.hold import apply_control
from holdfast.importance.prior import ImportancePrior


def prior(seed: int = 0) -> ImportancePrior:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "encoder.block.0.q.weight": (4, 6),
        "encoder.block.0.k.weight": (2, 6),
        "encoder.block.1.q.weight": (4, 6),
        "decoder.block.0.q.weight": (4, 6),
        "head.weight": (3, 3),
    }
    return ImportancePrior(
        {n: torch.randn(s, generator=generator) for n, s in shapes.items()}, {"tasks": ["a"]}
    )


@given(st.integers(0, 2**40))
def test_permuting_keeps_each_tensors_multiset(seed: int) -> None:
    original = prior(seed % 7)
    shuffled = apply_control(original, "permuted", seed)
    for name, tensor in original.tensors.items():
        other = shuffled.tensors[name]
        assert other.shape == tensor.shape
        assert torch.equal(other.flatten().sort().values, tensor.flatten().sort().values)
        assert not torch.equal(other, tensor)


def test_permutation_depends_on_seed_and_name_only() -> None:
    original = prior()
    name = "encoder.block.1.q.weight"
    alone = ImportancePrior({name: original.tensors[name]})
    first = apply_control(original, "permuted", 3).tensors[name]
    assert torch.equal(first, apply_control(alone, "permuted", 3).tensors[name])
    assert not torch.equal(first, apply_control(original, "permuted", 4).tensors[name])


def test_tensor_mean_is_the_mean_of_what_protects() -> None:
    original = prior()
    for name, tensor in apply_control(original, "tensor-mean").tensors.items():
        expected = original.tensors[name].clamp(min=0).mean()
        torch.testing.assert_close(tensor, expected.expand_as(tensor))


def test_layer_mean_joins_a_blocks_tensors_and_no_others() -> None:
    original = prior().tensors
    mean = apply_control(prior(), "layer-mean").tensors
    joined = torch.cat([original[f"encoder.block.0.{m}.weight"].clamp(min=0).flatten() for m in "qk"]).mean()
    for module in "qk":
        tensor = mean[f"encoder.block.0.{module}.weight"]
        torch.testing.assert_close(tensor, joined.expand_as(tensor))
    for name in ("encoder.block.1.q.weight", "decoder.block.0.q.weight", "head.weight"):
        torch.testing.assert_close(mean[name], original[name].clamp(min=0).mean().expand_as(mean[name]))
    assert list(mean) == list(original)


def test_control_is_recorded_and_none_changes_nothing() -> None:
    original = prior()
    assert apply_control(original, "none") is original
    assert apply_control(original, "permuted", 5).meta == {
        "tasks": ["a"],
        "control": "permuted",
        "control_seed": 5,
    }
    assert original.meta == {"tasks": ["a"]}


def test_unknown_control_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Allowed: none, permuted, tensor-mean, layer-mean"):
        apply_control(prior(), "shuffle")  # type: ignore[arg-type]
