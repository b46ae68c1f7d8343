"""`importance: inputs` against literal float64 transcriptions of its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.importance import compute_prior
from holdfast.importance.inputs import InputMoments
from holdfast.importance.seeding import seed_for
from holdfast.models import input_dims, linear_modules
from holdfast.names import canonical_name
from holdfast.tasks.encode import Encoded
from tiny_models import tiny_model

ROWS = [
    Encoded([5, 6, 7, 8], [9, 10], 0),
    Encoded([11, 5], [12], 0),
    Encoded([6, 9, 13, 7, 5, 10, 11], [8, 8, 14], 0),
    Encoded([8], [5, 6], 0),
]
KINDS = ["llama", "gpt2", "llama-lora"]


def double(kind: str) -> Any:
    model = tiny_model(kind).double()
    if kind == "llama-lora":
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():  # at first B is 0, and nothing passes through A
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return model


def close(got: Tensor, expected: Tensor) -> None:
    assert (got.double() - expected.double()).abs().max() <= 1e-5 * expected.abs().max() + 1e-12


def trained_maps(model: nn.Module) -> dict[str, Any]:
    return {
        canonical_name(f"{path}.weight"): module
        for path, module in linear_modules(model)
        if canonical_name(f"{path}.weight") in input_dims(model) and module.weight.requires_grad
    }


def one_row(model: Any, row: Encoded) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """x (T, I), W x (T, O) and the gradient of the answer's logits at W x + b, of each map; no padding."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    maps = trained_maps(model)
    for name, module in maps.items():

        def keep(module: Any, args: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach()[0], output)

        handles.append(module.register_forward_hook(keep))
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    for p in model.parameters():
        p.requires_grad_(True)
    logits = model(input_ids=ids).logits[0]
    first = len(row.prompt_ids)
    target = sum(logits[first + i - 1, token] for i, token in enumerate(row.completion_ids))
    target.backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, module in maps.items():
        x, output = seen[name]
        assert output.grad is not None
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        found[name] = (x, x @ weight.detach().t(), output.grad[0])
    return found


def by_hand(kind: str, shares: Any) -> dict[str, Tensor]:
    """1/S Σ_s Σ_t r_st x_st x_stᵀ in plain loops; shares(row, Wx, gradient) -> unscaled r (T,)."""
    total: dict[str, Tensor] = {}
    for row in ROWS:
        model = double(kind)
        for name, (x, wx, gradient) in one_row(model, row).items():
            r = shares(row, wx, gradient).double()
            for t in range(len(x)):
                total[name] = total.get(name, 0) + r[t] / r.sum() * torch.outer(x[t], x[t]) / len(ROWS)
    return total


def answers(row: Encoded, wx: Tensor, gradient: Tensor) -> Tensor:
    first, last = len(row.prompt_ids) - 1, len(row.prompt_ids) + len(row.completion_ids) - 1
    return ((torch.arange(len(wx)) >= first) & (torch.arange(len(wx)) < last)).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weighting", "shares"),
    [
        ("uniform", lambda row, wx, gradient: torch.ones(len(wx))),
        ("answer", answers),
        ("gradient", lambda row, wx, gradient: (gradient * wx).sum(-1).abs()),
    ],
)
def test_moments_are_the_formula_with_padding_left_out(kind: str, weighting: str, shares: Any) -> None:
    expected = by_hand(kind, shares)
    model = double(kind)
    options = {"name": "inputs", "weighting": weighting, "batch_size": 3}
    if weighting == "gradient":
        options["correct_only"] = False
    prior = compute_prior(model, ROWS, options, pad_id=0)
    assert prior.kind == "inputs"
    assert set(prior.tensors) == set(trained_maps(model))
    for name, c_II in prior.tensors.items():
        close(c_II, expected[name])


def test_relevance_is_the_lrp_gradient_times_the_output() -> None:
    # the same engine's per-sample maps give R(W) = W ⊙ Σ_t λ_t x_tᵀ: with one token their sum is λ · W x
    from holdfast.attribution import AttributionOptions, attribute_batches

    class Recorder:
        def __init__(self) -> None:
            self.seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
            if len(grad_S):
                self.seen[name] = (weight.clone(), grad_S.clone())  # type: ignore[assignment]

    class Tokens(Recorder):
        def take_tokens(self, name: str, x: Tensor, lam: Tensor, passed: Tensor, real: Tensor) -> None:
            self.seen[name] = (x.clone(), lam.clone(), passed.clone())

    options = AttributionOptions(rules="attnlrp", halves="none")
    maps, tokens = Recorder(), Tokens()
    for fold in (maps, tokens):
        attribute_batches(double("llama"), ROWS, options=options, fold=fold, pad_id=0, correct_only=False)
    prior = compute_prior(double("llama"), ROWS, {"name": "inputs", "correct_only": False}, pad_id=0)
    for name, (weight, grad_S) in maps.seen.items():  # type: ignore[misc]
        x_STI, lam_STO, passed_ST = tokens.seen[name]
        torch.testing.assert_close(torch.einsum("sto,sti->soi", lam_STO, x_STI), grad_S)
        torch.testing.assert_close((lam_STO * (x_STI @ weight.t())).sum(-1), passed_ST)
        expected = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        for s in range(len(ROWS)):
            r = torch.stack([(lam @ (weight @ x)).abs() for lam, x in zip(lam_STO[s], x_STI[s], strict=True)])
            for t in range(len(r)):
                expected += r[t] / r.sum() * torch.outer(x_STI[s, t], x_STI[s, t]) / len(ROWS)
        close(prior.tensors[name], expected)


@pytest.mark.parametrize("weighting", ["relevance", "uniform", "gradient", "loss_gradient", "answer"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_batch_size_changes_nothing_but_rounding(kind: str, weighting: str) -> None:
    only = {"correct_only": False} if weighting in ("relevance", "gradient") else {}
    found = [
        compute_prior(
            tiny_model(kind).double(),
            ROWS,
            {"name": "inputs", "weighting": weighting, "batch_size": size, **only},
            pad_id=0,
        )
        for size in (1, 4)
    ]
    for name, c_II in found[0].tensors.items():
        assert torch.equal(c_II, c_II.t())
        close(found[1].tensors[name], c_II)
        assert torch.linalg.eigvalsh(c_II.double()).min() > -1e-6 * c_II.abs().max()


def test_shuffled_relevance_gives_each_sample_the_same_weights_at_other_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x_STI = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    weight_ST = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    real_ST = torch.tensor([[False, True, True, True, True], [True] * 5])
    fold = InputMoments("relevance", shuffled=7)
    fold.add("w", x_STI, weight_ST, real_ST)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for s in range(2):
        at = real_ST[s].nonzero().flatten()
        order = torch.randperm(len(at), generator=torch.Generator().manual_seed(seed_for(f"w:{s}", 7)))
        r = weight_ST[s, at] / weight_ST[s, at].sum()
        for position, source in zip(at, order, strict=True):
            expected += r[source] * torch.outer(x_STI[s, position], x_STI[s, position]) / 2
    torch.testing.assert_close(fold.result({"w": 3}, 2)["w"], expected.float())
    plain = InputMoments("relevance")
    plain.add("w", x_STI, weight_ST, real_ST)
    assert not torch.allclose(plain.result({"w": 3}, 2)["w"], expected.float())
