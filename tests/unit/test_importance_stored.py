"""A prior on disk as a byte a value: how far off it is, and that all who read it unpack it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.errors import ConfigError
from holdfast.importance.prior import ImportancePrior
from holdfast.importance.stored import BLOCK, packed, unpacked
from holdfast.report.importance_map import importance_map


@given(st.integers(1, 300), st.integers(0, 99), st.floats(-12, 12))
@settings(max_examples=40, deadline=None)
def test_bytes_are_off_by_a_254th_of_their_blocks_largest_value_at_most(
    size: int, seed: int, magnitude: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) ** 3 * 10**magnitude
    (got,) = unpacked(packed({"w": values}, "int8")).values()
    for part, back in zip(values.split(BLOCK), got.split(BLOCK), strict=True):
        assert (part - back).abs().max() <= part.abs().max() / 254 * (1 + 1e-4)


def test_the_bound_holds_where_a_254th_of_the_largest_is_no_normal_number() -> None:
    values = torch.linspace(-1, 1, BLOCK) * 1e-37
    (got,) = unpacked(packed({"w": values}, "int8")).values()
    assert (values - got).abs().max() <= 1e-37 / 254 * (1 + 1e-2)


def test_zeros_stay_zeros_and_the_largest_value_itself() -> None:
    values = torch.zeros(3, 70)
    values[1, 2] = 5.0
    (got,) = unpacked(packed({"w": values}, "int8")).values()
    assert torch.equal(got, values)


def a_prior(kind: str) -> ImportancePrior:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.q.weight": torch.rand(8, 64, generator=generator) for i in range(2)}
    if kind == "inputs":
        tensors = {name: t.t() @ t for name, t in tensors.items()}
        return ImportancePrior(tensors, {"kind": "inputs"}).leading(5)
    return ImportancePrior(tensors)


@pytest.mark.parametrize("kind", ["weights", "inputs"])
def test_a_prior_of_bytes_is_loaded_and_shown_as_what_it_was(kind: str, tmp_path: Path) -> None:
    prior = a_prior(kind)
    prior.save(tmp_path / "float32")
    prior.save(tmp_path / "int8", dtype="int8")
    sizes = [(tmp_path / width / "prior.safetensors").stat().st_size for width in ("float32", "int8")]
    assert sizes[1] < 0.45 * sizes[0]  # tiny: names take most of what is left
    loaded = ImportancePrior.load(tmp_path / "int8")
    bare = ImportancePrior.load(tmp_path / "int8" / "prior.safetensors", kind="inputs")
    for name, tensor in prior.items():
        for found in (loaded, bare):
            assert (found[name] - tensor).abs().max() <= tensor.abs().max() / 254 * (1 + 1e-4)
    maps = [importance_map(tmp_path / width / "prior.safetensors") for width in ("float32", "int8")]
    assert maps[0].modules == maps[1].modules
    for one, other in zip(maps[0].means, maps[1].means, strict=True):
        assert other == pytest.approx(one, rel=0.02)


def test_another_width_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"save: no dtype='int4'\. Allowed: float32, bfloat16, int8"):
        a_prior("weights").save(tmp_path, dtype="int4")  # type: ignore[arg-type]
    out = tmp_path / "p"
    words = ["--model", "none", "--data", "none.jsonl", "--out", str(out), "--store", "int4"]
    ended = CliRunner().invoke(app, ["attribute", *words], env={"COLUMNS": "80"})
    assert ended.exit_code == 2
    assert "store" in ended.stderr
    assert "'float32', 'bfloat16' or 'int8'" in ended.stderr
    assert not out.exists()
