"""ewc-lora, slao, ella and c-lora: what each holds LoRA by, against its formula in double precision."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models import LoraOptions, add_lora
from holdfast.models.adapters import lora_factors, lora_layers
from holdfast.runner import RunConfig, run
from holdfast.strategies.lora.c_lora import subspace
from holdfast.strategies.lora.ewc_lora import product
from holdfast.strategies.lora.slao import orthogonal_rows
from lora_cases import STREAM, TOKENIZER, R, learn, lora_model, strategy_of, train_by_chance
from tiny_models import tiny_model
from tiny_runs import tiny_run

SCALE = 8.0 / R
ZERO = torch.zeros((), dtype=torch.float64)  # the loss that terms are added to


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    found = torch.autograd.grad(loss, [p for pair in lora_factors(model) for p in pair], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def same_gradients(loss: Tensor, expected: Tensor, model: Any) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for got, want in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-14)


# ewc-lora


def test_ewc_loras_penalty_and_its_gradient_are_the_formula_over_entries_of_the_product(
    tmp_path: Path,
) -> None:
    strategy, model = strategy_of("ewc-lora", strength=7.0, fisher={"samples": 4}), lora_model()
    learn(strategy, model, 0, tmp_path)
    starts = [(b @ a).detach().clone() * SCALE for a, b in lora_factors(model)]
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    assert strategy.loss(model, {}, None, ZERO) == 0, "nothing has moved yet"
    train_by_chance(model, 3)
    expected = ZERO
    fisher = strategy.fisher  # type: ignore[attr-defined]
    assert fisher.keys() == lora_layers(model).keys()
    for name, (a, b), start in zip(lora_layers(model), lora_factors(model), starts, strict=True):
        change = SCALE * b @ a - start
        expected = expected + ((7.0 * fisher[name]).double() * change**2).sum() / 2
    assert expected > 0
    same_gradients(strategy.loss(model, {}, None, ZERO), expected, model)


def test_fisher_is_the_mean_squared_gradient_of_single_rows_by_the_merged_weights(tmp_path: Path) -> None:
    strategy, model = strategy_of("ewc-lora", fisher={"samples": 3}), lora_model()
    train_by_chance(model, 5, 0.3)
    context = context_of(model, tmp_path)
    task = type(STREAM.tasks[0])("copy", STREAM.tasks[0].train[:3], ())
    stage = stage_of(STREAM, 0)
    plain = copy.deepcopy(model).merge_and_unload()
    strategy.begin(context, stage)
    strategy.end(context, type(stage)("copy", (task,), 0, 1))
    for name, fisher in strategy.fisher.items():  # type: ignore[attr-defined]
        weight = plain.get_parameter(name).requires_grad_(True)
        expected = torch.zeros_like(weight)
        for row in context.encoder.many(task.train):
            ids = torch.tensor([row.prompt_ids + row.completion_ids])
            log_p = plain(input_ids=ids).logits[0].log_softmax(-1)
            start = len(row.prompt_ids)
            answer = sum(log_p[i - 1, ids[0, i]] for i in range(start, ids.shape[1]))
            (gradient,) = torch.autograd.grad(answer, weight)
            expected += gradient**2 / 3
        torch.testing.assert_close(fisher.double(), expected.detach(), rtol=2e-4, atol=1e-9)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in trained), "the base is frozen again"


def test_fishers_of_tasks_add_up_and_decay_by_gamma(tmp_path: Path) -> None:
    kept = {}
    for gamma in (1.0, 0.25):
        strategy, model = strategy_of("ewc-lora", gamma=gamma, fisher={"samples": 4}), lora_model()
        learn(strategy, model, 0, tmp_path)
        first = dict(strategy.fisher)  # type: ignore[attr-defined]
        learn(strategy, model, 1, tmp_path)
        kept[gamma] = (first, strategy.fisher)  # type: ignore[attr-defined]
    for name in kept[1.0][0]:
        one, summed = (part[name].double() for part in kept[1.0])
        _, decayed = (part[name].double() for part in kept[0.25])
        torch.testing.assert_close(summed - decayed, 0.75 * one, rtol=1e-3, atol=1e-7)


def test_product_is_laid_out_as_the_weight_that_it_is_added_to() -> None:
    model = add_lora(tiny_model("gpt2"), LoraOptions(r=2, alpha=3.0))
    train_by_chance(model, 1)
    plain, merged = tiny_model("gpt2"), copy.deepcopy(model).merge_and_unload()
    layers = lora_layers(model)
    assert layers
    for name, layer in layers.items():
        change = merged.get_parameter(name) - plain.get_parameter(name)
        torch.testing.assert_close(product(layer), change, rtol=1e-4, atol=1e-6)


# slao


def test_orthogonal_rows_are_qrs_with_each_row_on_its_side() -> None:
    a = torch.randn(R, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = orthogonal_rows(a)
    torch.testing.assert_close(rows @ rows.T, torch.eye(R, dtype=torch.float64), atol=1e-12, rtol=0)
    lower = a @ rows.T  # Rᵀ
    torch.testing.assert_close(lower.triu(1), torch.zeros_like(lower), atol=1e-12, rtol=0)
    assert (lower.diagonal() > 0).all()
    torch.testing.assert_close(lower @ rows, a, atol=1e-12, rtol=0)


def test_slao_starts_orthogonal_from_the_last_tasks_b_and_merges_by_one_over_root_i(tmp_path: Path) -> None:
    strategy, model = strategy_of("slao"), lora_model()
    merged: list[Tensor] = []
    last_a: list[Tensor] = []
    last_b: list[Tensor] = []
    for number in range(3):
        context, stage = context_of(model, tmp_path), stage_of(STREAM, number)
        strategy.begin(context, stage)
        if number:
            for (a, b), was_a, was_b in zip(lora_factors(model), last_a, last_b, strict=True):
                assert torch.equal(a, orthogonal_rows(was_a))
                assert torch.equal(b, was_b)
        train_by_chance(model, number)
        last_a, last_b = ([f[i].detach().clone() for f in lora_factors(model)] for i in (0, 1))
        strategy.end(context, stage)
        before = merged or last_b
        merged = [m + (b - m) / math.sqrt(number + 1) for m, b in zip(before, last_b, strict=True)]
        for (a, b), trained_a, expected in zip(lora_factors(model), last_a, merged, strict=True):
            assert torch.equal(a, trained_a)
            torch.testing.assert_close(b.detach(), expected, rtol=1e-12, atol=1e-15)
    assert json.loads((tmp_path / "adapters.json").read_text())["merged"] == 1 / math.sqrt(3)


# ella


def test_ellas_penalty_and_its_gradient_are_the_formula_over_tasks_and_entries(tmp_path: Path) -> None:
    strategy, model = strategy_of("ella", strength=5.0), lora_model()
    for number in range(3):
        strategy.begin(context_of(model, tmp_path), stage_of(STREAM, number))
        assert strategy.loss(model, {}, None, ZERO) == 0, "B starts at zero"
        train_by_chance(model, number)
        if number < 2:
            strategy.end(context_of(model, tmp_path), stage_of(STREAM, number))
    expected = ZERO
    past = strategy._past  # type: ignore[attr-defined]
    strategy._past = [  # the earlier ranks moved with the others above: take them as they stand
        (SCALE * sum(b.detach()[:, t : t + R] @ a.detach()[t : t + R] for t in (0, R))) ** 2
        for a, b in lora_factors(model)
    ]
    assert [p.shape for p in past] == [p.shape for p in strategy._past]
    for a, b in lora_factors(model):
        earlier = SCALE * (
            b.detach()[:, :R] @ a.detach()[:R] + b.detach()[:, R : 2 * R] @ a.detach()[R : 2 * R]
        )
        new = SCALE * b[:, 2 * R :] @ a[2 * R :]
        expected = expected + 5.0 * (new**2 * earlier**2).sum()
    same_gradients(strategy.loss(model, {}, None, ZERO), expected, model)


def test_ella_takes_the_past_update_as_the_task_finds_it_and_frees_what_nothing_changed(
    tmp_path: Path,
) -> None:
    strategy, model = strategy_of("ella", strength=1.0), lora_model()
    learn(strategy, model, 0, tmp_path)
    with torch.no_grad():
        for _, b in lora_factors(model):
            b[0] = 0.0  # nothing has changed the first output's weights
    expected = [(SCALE * b @ a).square() for a, b in lora_factors(model)]
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    for got, want in zip(strategy._past, expected, strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)
    with torch.no_grad():
        for _, b in lora_factors(model):
            b[:, R:] = 0.0
            b[0, R:] = 1.0
    assert strategy.loss(model, {}, None, ZERO) == 0
    with torch.no_grad():
        for _, b in lora_factors(model):
            b[1, R:] = 1.0
    assert strategy.loss(model, {}, None, ZERO) > 0


def test_ella_without_strength_is_inc_lora(tmp_path: Path) -> None:
    strategy, model = strategy_of("ella", strength=0.0), lora_model()
    learn(strategy, model, 0, tmp_path)
    assert json.loads((tmp_path / "adapters.json").read_text())["overlap"] == 0.0, "there is none before"
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    assert strategy.loss(model, {}, None, ZERO) is ZERO
    strategy.end(context_of(model, tmp_path), stage_of(STREAM, 1))
    assert json.loads((tmp_path / "adapters.json").read_text())["overlap"] is None, "it was not measured"


# c-lora


@pytest.mark.parametrize(("share", "columns"), [(0.5, 8), (0.01, 1), (1.0, 16)])
def test_subspace_is_orthonormal_and_drawn_by_its_seed(share: float, columns: int) -> None:
    p = subspace(16, share, 3)
    assert p.shape == (16, columns)
    torch.testing.assert_close(p.T @ p, torch.eye(columns), atol=1e-5, rtol=0)
    assert torch.equal(p, subspace(16, share, 3))
    assert not torch.equal(p, subspace(16, share, 4))


def test_c_loras_penalty_and_its_gradient_are_the_formula(tmp_path: Path) -> None:
    strategy, model = strategy_of("c-lora", strength=3.0, share=0.25), lora_model()
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 0))
    train_by_chance(model, 2)
    bound = strategy._bound  # type: ignore[attr-defined]
    assert len({tuple(p.flatten().tolist()) for _, _, p in bound}) == len(bound), "each side has its own"
    expected = ZERO
    for number, (a, b) in enumerate(lora_factors(model)):
        (_, side_a, p_a), (_, side_b, p_b) = bound[2 * number : 2 * number + 2]
        assert (side_a, side_b) == ("a", "b")
        assert (p_a.shape[0], p_b.shape[0]) == (a.shape[1], b.shape[0])
        for row in a:
            for column in p_a.T:
                expected = expected + 3.0 * (row @ column) ** 2
        for column_b in b.T:
            for column in p_b.T:
                expected = expected + 3.0 * (column_b @ column) ** 2
    same_gradients(strategy.loss(model, {}, None, ZERO), expected, model)


def test_subspaces_are_the_same_in_each_task_and_for_each_learner_of_a_seed(tmp_path: Path) -> None:
    drawn = []
    for number in (0, 1):
        strategy, model = strategy_of("c-lora"), lora_model()
        strategy.begin(context_of(model, tmp_path), stage_of(STREAM, number))
        drawn.append([p for _, _, p in strategy._bound])  # type: ignore[attr-defined]
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


def test_penalty_keeps_the_update_out_of_the_subspaces(tmp_path: Path) -> None:
    left = {}
    for strength in (0.0, 10.0):
        values = tiny_run(tmp_path / str(strength), strategy={"name": "c-lora", "strength": strength})
        values["model"] |= {"lora": {"r": R}}
        values["tasks"] |= {"order": ["copy"]}
        values["training"] |= {"max_steps": 60, "learning_rate": 1e-2}
        run(validate(RunConfig, values, "test"))
        file = tmp_path / str(strength) / "tasks" / "01-copy" / "adapters.json"
        left[strength] = json.loads(file.read_text())["inside"]
    assert 0.3 < left[0.0] < 0.7, "half of the directions hold half of it"
    assert left[10.0] < 0.02


# what is checked


@pytest.mark.parametrize("name", ["ewc-lora", "slao", "c-lora", "ella", "inf-lora", "lora-routed"])
def test_plain_lora_is_wanted(name: str) -> None:
    strategy = strategy_of(name)
    with pytest.raises(ConfigError, match=rf"'{name}' .* no LoRA\. Set model\.lora"):
        strategy.check(tiny_model("llama"))
    strategy.check(lora_model())
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"has use_dora = True\. Give a plain one"):
        strategy.check(get_peft_model(tiny_model("llama"), config))


def test_tokenizer_and_stream_are_those_of_the_contexts() -> None:
    assert TOKENIZER.pad_token_id is not None
    assert [task.name for task in STREAM] == ["copy", "flip", "head"]
