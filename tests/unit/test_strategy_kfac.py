"""kfac: its factors and its penalty against literal float64 formulas, and what joining tasks keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contexts import context_of, stage_of
from holdfast.importance.fisher import FisherOptions
from holdfast.models import block_parameters, input_dims, linear_modules
from holdfast.names import canonical_name
from holdfast.strategies.kfac import Factors, KroneckerPenalty, factors_of, joined
from holdfast.tasks.encode import Encoded
from lora_cases import STREAM, strategy_of
from tiny_models import tiny_model

ROWS = [
    Encoded([5, 6, 7, 8], [9, 10], 0),
    Encoded([11, 5], [12], 0),
    Encoded([6, 9, 13, 7, 5, 10, 11], [8, 8, 14], 0),
]


def close(got: Tensor, expected: Tensor) -> None:
    assert (got.double() - expected.double()).abs().max() <= 1e-5 * expected.abs().max() + 1e-14


def literal(model: Any) -> Factors:
    """A and G of each map, from one row at a time, without padding and with plain autograd."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    names = {canonical_name(f"{path}.weight"): module for path, module in linear_modules(model)}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = args[0].detach()[0], output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in names.items()]
    found: Factors = {}
    for row in ROWS:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logits = model(ids).logits[0].log_softmax(-1)
        first = len(row.prompt_ids) - 1
        torch.stack([logits[first + i, token] for i, token in enumerate(row.completion_ids)]).sum().backward()
        for name, (x_TI, output) in seen.items():
            lam_TO = torch.zeros_like(output[0]) if output.grad is None else output.grad[0]
            a_II, g_OO = x_TI.T @ x_TI / len(x_TI) / len(ROWS), lam_TO.T @ lam_TO / len(ROWS)
            old = found.get(name, (0.0, 0.0))
            found[name] = old[0] + a_II, old[1] + g_OO
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_factors_are_the_moments_of_inputs_and_of_gradients_at_the_outputs(kind: str) -> None:
    model = tiny_model(kind).double().eval()
    got = factors_of(model, ROWS, FisherOptions(batch_size=2), pad_id=0)
    expected = literal(model)
    maps = {name for name in block_parameters(model) if name in input_dims(model)}
    assert maps == {name for name in got if name in input_dims(model)}
    for name in maps:
        close(got[name][0], expected[name][0])
        close(got[name][1], expected[name][1])
        bias = f"{name.removesuffix('weight')}bias"
        assert (bias in got) == (bias in block_parameters(model))
        if bias in got:
            assert got[bias][0].tolist() == [[1.0]]
            close(got[bias][1], expected[name][1])


def chance(sizes: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    roots = [torch.randn(n, n + 1, generator=draw, dtype=torch.float64) for n in sizes]
    a_II, g_OO = (root @ root.T for root in roots)
    return a_II, g_OO


def chance_factors(model: nn.Module, seed: int) -> Factors:
    dims, found = input_dims(model), Factors()
    for number, (name, p) in enumerate(block_parameters(model).items()):
        shape = (*p.shape, 1)[:2] if dims.get(name, 1) == 1 else p.shape[::-1]
        found[name] = chance((shape[1], shape[0]), 100 * seed + number)
    return found


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_penaltys_gradient_is_that_of_the_quadratic_form_of_kronecker_products(kind: str, tasks: int) -> None:
    model = tiny_model(kind).double().requires_grad_(False)
    for p in block_parameters(model, trainable_only=False).values():
        p.requires_grad_(True)
    factors = [chance_factors(model, seed) for seed in range(tasks)]
    start = {name: p.detach().clone() for name, p in block_parameters(model).items()}
    penalty = KroneckerPenalty(factors, model, strength=7.0, reference=start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)  # at 0, and without a gradient, a step is none
    handle = penalty.attach(model, optimizer)
    draw = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        p.grad = torch.zeros_like(p)
    expected, dims = torch.zeros((), dtype=torch.float64), input_dims(model)
    for name, p in block_parameters(model).items():
        change = p - start[name]
        change_OI = change[:, None] if change.dim() == 1 else change if dims[name] else change.T
        vector = change_OI.T.flatten()  # column by column, as in vec(G Δ A) = (A ⊗ G) vec(Δ)
        for of_task in factors:
            expected = expected + 3.5 * vector @ torch.kron(*of_task[name]) @ vector
    torch.testing.assert_close(penalty.loss(model), expected, rtol=1e-9, atol=0)
    optimizer.step()
    handle.remove()
    names = block_parameters(model)
    wanted = torch.autograd.grad(expected, list(names.values()))
    for p, gradient in zip(names.values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_joining_a_task_with_itself_is_exact_and_of_others_the_trace_is_kept() -> None:
    one, other = ({"w": chance((4, 3), seed)} for seed in (1, 2))
    a_II, g_OO = joined(one, one)["w"]
    torch.testing.assert_close(torch.kron(a_II, g_OO), 2 * torch.kron(*one["w"]))
    a_II, g_OO = joined(joined(one, other), one)["w"]
    traces = [torch.kron(*factors["w"]).trace() for factors in (one, other, one)]
    torch.testing.assert_close(torch.kron(a_II, g_OO).trace(), torch.stack(traces).sum())
    assert torch.linalg.eigvalsh(torch.kron(a_II, g_OO)).min() > 0
    nothing = {"w": (a_II, torch.zeros_like(g_OO))}
    assert joined(nothing, nothing)["w"][1].abs().max() == 0


@pytest.mark.parametrize(("variant", "kept"), [("sum", 1), ("separate", 2)])
def test_state_is_one_pair_a_map_or_one_for_each_task(variant: str, kept: int, tmp_path: Path) -> None:
    model = tiny_model("gpt2").eval()
    strategy = strategy_of("kfac", variant=variant, fisher={"samples": 2})
    for number in range(2):
        context, stage = context_of(model, tmp_path), stage_of(STREAM, number)
        strategy.begin(context, stage)
        strategy.end(context, stage)
    tensors, values = strategy.state_dict()
    assert len(tensors) == 2 * kept * len(block_parameters(model))
    again = strategy_of("kfac", variant=variant)
    again.load_state_dict(tensors, values)
    assert all(torch.equal(t, tensors[n]) for n, t in again.state_dict()[0].items())
