"""With A's rules a projection's heads are matrices of their own: eq. 10's largest is taken in each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attribution_models import ROWS, build
from holdfast.importance import compute_prior
from holdfast.importance.aggregate import EPSILON, TopKMean
from holdfast.importance.heads import PerHead, splits_of
from tiny_models import tiny_model


def equation_10(value: Tensor) -> Tensor:
    return value.sign() * value.abs().log1p() / (math.log1p(float(value.abs().max())) + EPSILON)


@pytest.mark.parametrize("dim", [0, 1], ids=["Linear", "Conv1D"])
def test_the_largest_of_equation_10_is_that_of_each_head(dim: int) -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(6, 6), torch.randn(3, 6, 6) * torch.tensor([1.0, 30.0, 0.1])[:, None, None]
    fold = PerHead(TopKMean(2), {"q.weight": (2, dim)})
    relevance = [grad * weight for grad in grads]
    for name in ("q.weight", "o.weight"):
        fold.update(name, weight, grads.clone())  # which it may overwrite
    of_heads = [torch.cat([equation_10(h) for h in r.split(2, dim=dim)], dim=dim) for r in relevance]
    for name, maps in (("q.weight", of_heads), ("o.weight", [equation_10(r) for r in relevance])):
        expected = torch.stack(maps).topk(2, dim=0).values.mean(0)
        torch.testing.assert_close(fold.result()[name], expected, rtol=1e-5, atol=1e-6)


def test_a_fold_that_goes_on_in_another_process_ends_as_one_that_was_not_killed() -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(4, 3), torch.randn(5, 4, 3)
    whole, first, second = (PerHead(TopKMean(2), {"k.weight": (2, 0)}) for _ in range(3))
    whole.update("k.weight", weight, grads.clone())
    first.update("k.weight", weight, grads[:3].clone())
    tensors, values = first.state()
    second.load_state({n: t.clone() for n, t in tensors.items()}, values, {"k.weight": weight})
    second.update("k.weight", weight, grads[3:].clone())
    assert torch.equal(second.result()["k.weight"], whole.result()["k.weight"])


def test_projections_are_found_fused_and_grouped_ones_too_and_nothing_else() -> None:
    llama = splits_of(tiny_model("llama"))
    assert {name.split(".")[-2] for name in llama} == {"q_proj", "k_proj", "v_proj"}
    assert set(llama.values()) == {(8, 0)}
    gpt2 = splits_of(tiny_model("gpt2"))
    assert {name.split(".")[-2] for name in gpt2} == {"c_attn"}
    assert set(gpt2.values()) == {(8, 1)}
    assert {name.split(".")[-2] for name in splits_of(tiny_model("t5"))} == {"q", "k", "v"}
    assert {name.split(".")[-2] for name in splits_of(tiny_model("bloom"))} == {"query_key_value"}


def test_each_head_of_a_prior_by_the_papers_rules_reaches_the_papers_one() -> None:
    options = {"name": "lrp", "rules": "paper", "halves": "path", "aggregate": "topk", "top_k": 1}
    options |= {"correct_only": False, "per_weight": False, "samples": 1}
    model = build("llama")
    values = compute_prior(model, ROWS[:1], options, pad_id=0).tensors
    for name, (size, dim) in splits_of(model).items():
        for part in values[name].split(size, dim=dim):
            assert float(part.abs().max()) == pytest.approx(1.0, abs=1e-3), name
