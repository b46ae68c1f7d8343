"""Products of 16-bit values take TF32 on a GPU; nothing else does, and nothing is left switched."""

from __future__ import annotations

import pytest
import torch

from holdfast.precision import products_for

MATMUL = torch.backends.cuda.matmul


@pytest.mark.parametrize(
    ("dtypes", "inside"),
    [
        ({torch.bfloat16}, "tf32"),
        ({torch.float16, torch.bfloat16}, "tf32"),
        ({torch.float32}, None),
        ({torch.bfloat16, torch.float32}, None),
    ],
)
def test_sixteen_bit_products_are_tf32_inside_and_the_setting_comes_back(
    monkeypatch: pytest.MonkeyPatch, dtypes: set[torch.dtype], inside: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = MATMUL.fp32_precision
    with products_for(dtypes):
        assert MATMUL.fp32_precision == (inside or before)
    assert MATMUL.fp32_precision == before


def test_without_a_gpu_nothing_is_switched() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = MATMUL.fp32_precision
    with products_for({torch.bfloat16}):
        assert MATMUL.fp32_precision == before
