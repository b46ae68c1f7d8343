"""inf-lora: A reads what new inputs span and old ones do not, B alone is trained, GPM decides what is old."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.models import add_lora
from holdfast.models.adapters import lora_factors, lora_layers
from holdfast.runner import RunConfig, run
from holdfast.strategies.lora.inf_lora import designed
from holdfast.strategies.lora.inputs import extended, input_moments
from holdfast.tasks import Encoder, Template
from lora_cases import STREAM, TOKENIZER, R, learn, lora_model, strategy_of, train_by_chance
from tiny_models import tiny_model
from tiny_runs import tiny_run

D = 8


def inputs_of(seed: int, rank: int = D, count: int = 30) -> Tensor:
    """H (D, N) float64, its energies far from equal."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=draw, dtype=torch.float64))[0]
    sizes = 3.0 ** -torch.arange(rank, dtype=torch.float64)
    return basis[:, :rank] * sizes @ torch.randn(rank, count, generator=draw, dtype=torch.float64)


def literal_gpm(basis: Tensor, h: Tensor, energy: float) -> Tensor:
    """The basis (D, k) of GPM, eqs. 8 and 9: columns are added one by one until enough is held."""
    left = h - basis @ basis.T @ h
    u, _, _ = torch.linalg.svd(left)
    while (basis.T @ h).square().sum() < energy * h.square().sum():
        basis, u = torch.cat([basis, u[:, :1]], 1), u[:, 1:]
    return basis


@given(seed=st.integers(0, 200), energy=st.sampled_from([0.3, 0.7, 0.95, 0.999]))
@settings(max_examples=25, deadline=None)
def test_held_directions_are_those_of_gpm_written_out(seed: int, energy: float) -> None:
    basis, held = torch.zeros(D, 0, dtype=torch.float64), None
    for task in range(3):
        h = inputs_of(10 * seed + task)
        basis, held = literal_gpm(basis, h, energy), extended(held, h @ h.T, energy)
        torch.testing.assert_close(held.double(), basis @ basis.T, atol=2e-5, rtol=0)
        assert (held.double() @ h).square().sum() >= energy * h.square().sum() * (1 - 1e-5)


def test_task_whose_inputs_are_held_already_adds_no_direction() -> None:
    h = inputs_of(0, rank=3)
    held = extended(None, h @ h.T, 1.0)
    assert round(float(held.trace())) == 3
    torch.testing.assert_close(extended(held, h @ h.T, 1.0), held, atol=1e-6, rtol=0)


def test_designed_rows_are_the_leading_singular_vectors_of_what_is_left_of_the_inputs() -> None:
    old, new = inputs_of(1), inputs_of(2)
    held = extended(None, old @ old.T, 0.9)
    left = new - held.double() @ new
    u, _, _ = torch.linalg.svd(left)
    expected, got = u[:, :3].T / math.sqrt(3), designed(new @ new.T, held, 3)
    signs = (expected * got).sum(1, keepdim=True).sign()
    torch.testing.assert_close(got, signs * expected, atol=1e-6, rtol=0)
    assert (got @ held.double()).abs().max() < 1e-6


def test_where_fewer_directions_are_left_the_other_ranks_are_zero() -> None:
    h = inputs_of(3, rank=4)
    held = extended(None, inputs_of(3, rank=2) @ inputs_of(3, rank=2).T, 1.0)
    rows = designed(h @ h.T, held, 4)
    assert torch.isfinite(rows).all()
    assert [bool(row.any()) for row in rows] == [True, True, False, False]
    assert not designed(h @ h.T, torch.eye(D), 4).any(), "everything is held: the task can't be learned"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_moments_are_sums_over_the_tokens_of_each_row_without_padding(kind: str) -> None:
    from holdfast.models import LoraOptions

    model = add_lora(tiny_model(kind), LoraOptions(r=2, target_modules="all-linear")).eval()
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    rows = encoder.many([*STREAM.tasks[0].train[:2], *STREAM.tasks[1].train[:2]])
    got = input_moments(model, rows, TOKENIZER.pad_token_id)
    name, layer = next(iter(lora_layers(model).items()))
    expected = torch.zeros_like(got[name]).double()
    table = model.get_base_model().get_input_embeddings()

    def add(_: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal expected
        for x in args[0].detach().double().flatten(0, -2):
            expected = expected + torch.outer(x, x)

    # the first layer's inputs again, of calls made here: its own tokens and nothing else
    hook, counted = layer.register_forward_pre_hook(add), 0
    for row in rows:
        ids = row.prompt_ids if kind == "t5" else row.prompt_ids + row.completion_ids
        counted += len(ids)
        extra = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), **extra)
    hook.remove()
    assert table is not None
    assert counted > 4
    torch.testing.assert_close(got[name].double(), expected, rtol=1e-4, atol=1e-5)


def test_new_lora_does_nothing_to_held_inputs_and_leaves_old_ranks_alone(tmp_path: Path) -> None:
    strategy, model = strategy_of("inf-lora", energy=0.9), lora_model()
    learn(strategy, model, 0, tmp_path)
    held = {name: m.double() for name, m in strategy.held.items()}  # type: ignore[attr-defined]
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    assert all(not a.requires_grad and b.requires_grad for a, b in lora_factors(model))
    train_by_chance(model, 7)
    for name, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        change = b[:, R:] @ a[R:]
        assert change.abs().max() > 1e-3, "there is something left to learn with"
        assert (change @ held[name]).abs().max() < 1e-5 * change.abs().max()


def test_run_trains_b_alone_and_writes_how_much_is_held(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", strategy={"name": "inf-lora", "energy": 0.9, "samples": 8})
    values["model"] |= {"lora": {"r": R}}
    values["training"] |= {"weight_decay": 0.1}
    run(validate(RunConfig, values, "test"))
    stages = sorted((tmp_path / "run" / "tasks").iterdir())
    weights = [load_file(stage / "model" / "adapter_model.safetensors") for stage in stages]
    held = [load_file(stage / "strategy.safetensors") for stage in stages]
    for number in (1, 2):
        for name in (n for n in weights[number] if ".lora_A." in n):
            layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
            new = weights[number][name][number * R :].double()
            assert torch.equal(weights[number][name][: number * R], weights[number - 1][name])
            # weight decay would have scaled the rows of norm 1 / √3, had A been trained
            norms = new.norm(dim=1)
            torch.testing.assert_close(norms, torch.full_like(norms, 3**-0.5), atol=1e-6, rtol=0)
            assert (new @ held[number - 1][layer].double()).abs().max() < 1e-5
            assert weights[number][name.replace("lora_A", "lora_B")][:, number * R :].any()
    shares = [json.loads((stage / "adapters.json").read_text())["held"] for stage in stages]
    assert 0 < shares[0] < shares[1] <= shares[2] < 1
    records = [json.loads((stage / "training.json").read_text())["trained"] for stage in stages]
    outputs = sum(b.shape[0] for n, b in weights[0].items() if ".lora_B." in n)
    assert records == [outputs * R * (number + 1) for number in range(3)]
