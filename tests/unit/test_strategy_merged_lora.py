"""attribution with a LoRA a task: where it begins, what is held, and what it becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from contexts import context_of, stage_of
from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold import tell_total_rate
from holdfast.hold.anchor import LORA_PULL
from holdfast.importance import ImportancePrior, compute_prior
from holdfast.models import LoraOptions, add_lora, digest, tiny_llama
from holdfast.models.adapters import (
    grow,
    lora_factors,
    lora_layers,
    plain_weight,
    recompress,
    scale_of,
    under_adapter,
    under_lora,
)
from holdfast.strategies.lora.inputs import freed
from holdfast.strategies.lora.merged import form_for, held_rows, of_whole_maps
from lora_cases import STREAM, TOKENIZER, learn, lora_model, strategy_of, train_by_chance
from tiny_models import tiny_model

INPUTS = {"name": "inputs", "samples": 4, "correct_only": False}
D = 8


def moment(seed: int = 0, rank: int = D) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, D, generator=draw, dtype=torch.float64) * 3.0 ** -torch.arange(D)
    return x.T @ x


def adapted(kind: str) -> Any:
    """A model with a LoRA that has learned something, in double precision."""
    options = LoraOptions(r=2, alpha=6.0, target_modules="all-linear")
    model = add_lora(tiny_model(kind).double(), options).eval()
    train_by_chance(model, 3)
    return model


def rows_of(model: Any) -> list[Any]:
    return context_of(model).encoder.many(STREAM.tasks[0].train[:4])


def merged_maps(model: Any) -> dict[str, Tensor]:
    return {
        name: (plain_weight(under_lora(layer)) + scale_of(layer) * b @ a).detach()
        for (name, layer), (a, b) in zip(lora_layers(model).items(), lora_factors(model), strict=True)
    }


def test_freed_rows_are_those_through_one_over_one_plus_pull_c_with_their_norms() -> None:
    c, rows = moment(), torch.randn(3, D, dtype=torch.float64)
    scaled = c * D / c.trace()
    expected = rows @ torch.linalg.inv(torch.eye(D, dtype=torch.float64) + 7 * scaled)
    expected = expected / expected.norm(dim=1, keepdim=True) * rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(freed(rows, c, 7.0), expected)
    torch.testing.assert_close(freed(rows, 100 * c, 7.0), expected)
    torch.testing.assert_close(freed(rows, c, 0.0), rows)


def test_without_end_freed_rows_leave_a_projectors_directions() -> None:
    basis = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0][:, :3]
    held, rows = basis @ basis.T, torch.randn(4, D, dtype=torch.float64)
    got, beside = freed(rows, held, 1e8), rows - rows @ held
    expected = beside / beside.norm(dim=1, keepdim=True)
    torch.testing.assert_close(got / got.norm(dim=1, keepdim=True), expected, atol=1e-6, rtol=0)
    assert torch.equal(freed(rows, torch.zeros(D, D), 5.0), rows), "of nothing known all is free"


@pytest.mark.parametrize("weighting", ["relevance", "uniform", "answer", "gradient", "loss_gradient"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_maps_under_the_adapter_are_rated_as_those_of_the_merged_model(kind: str, weighting: str) -> None:
    model, other = adapted(kind), adapted(kind)
    before, flags = digest(model), [p.requires_grad for p in model.parameters()]
    rows, pad = rows_of(model), TOKENIZER.pad_token_id
    options = {"name": "inputs", "samples": 4, "weighting": weighting}
    got = compute_prior(model, rows, options, pad_id=pad, parameters=under_adapter(model))
    assert digest(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    merged = other.merge_and_unload().requires_grad_(True)
    expected = compute_prior(merged, rows, options, pad_id=pad)
    assert set(got.tensors) <= set(expected.tensors)
    assert len(got) == len(lora_layers(model))
    for name, c in got.tensors.items():
        torch.testing.assert_close(c, expected.tensors[name])
    if weighting == "relevance":
        assert got.meta["conservation_max_relative_error"] < 1e-12
        with model.disable_adapter():
            without = compute_prior(model, rows, options, pad_id=pad, parameters=under_adapter(model))
        assert any(not torch.allclose(c, without.tensors[name]) for name, c in got.tensors.items())


def test_tasks_prior_is_of_whole_maps_and_holds_a_alone(tmp_path: Path) -> None:
    strategy, model = strategy_of("attribution", importance=INPUTS), lora_model()
    strategy.check(model)
    learn(strategy, model, 0, tmp_path)
    saved = ImportancePrior.load(tmp_path / "prior")
    assert set(saved.tensors) == set(lora_layers(model))
    saved.check_fits(model)
    rows = held_rows(saved, model)
    assert all(name.endswith(".lora_A.weight") for name in rows.tensors)
    rows.check_fits(model)
    bare = ImportancePrior(saved.tensors, {k: v for k, v in saved.meta.items() if k != "whole_maps"})
    with pytest.raises(PriorMismatchError, match="lora_A"):
        bare.check_fits(model)  # what is held as one LoRA must be rated itself
    for name, c in saved.tensors.items():
        assert torch.equal(rows.tensors[name.removesuffix(".weight") + ".lora_A.weight"], c)


@pytest.mark.parametrize("form", ["adapters", "weights"])
def test_next_adapter_begins_in_the_free_space_and_changes_nothing(form: str, tmp_path: Path) -> None:
    strategy, model = strategy_of("attribution", importance=INPUTS, merge_lora=form), lora_model()
    strategy.check(model)
    learn(strategy, model, 0, tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(ids).logits
    prior = strategy.prior.tensors  # type: ignore[attr-defined]
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    torch.testing.assert_close(model(ids).logits, before)
    new = slice(4, 8) if form == "adapters" else slice(0, 4)
    other = lora_model()
    grow(other, 4, 1)  # PEFT's start for the ranks of the second task of seed 0
    starts = zip(lora_layers(model), lora_factors(model), lora_factors(other), strict=True)
    for name, (a, b), (start, _) in starts:
        torch.testing.assert_close(a[new], freed(start[4:8], prior[name], LORA_PULL))
        assert not b[:, new].any()
        assert a.requires_grad
        assert b.requires_grad


def test_both_forms_are_the_same_model_and_only_one_changes_the_base(tmp_path: Path) -> None:
    models = {}
    for form in ("adapters", "weights"):
        strategy = strategy_of("attribution", importance=INPUTS, merge_lora=form)
        models[form] = model = lora_model()
        strategy.check(model)
        (folder := tmp_path / form).mkdir()
        for task in range(3):
            context = context_of(model, folder)
            strategy.begin(context, stage_of(STREAM, task))
            draw = torch.Generator().manual_seed(task)
            new = slice(4 * task, None) if form == "adapters" else slice(None)
            with torch.no_grad():
                for a, b in lora_factors(model):  # as much to the ranks of this task
                    a[new] += 0.1 * torch.randn(a[new].shape, generator=draw, dtype=a.dtype)
                    b[:, new] += 0.1 * torch.randn(b[:, new].shape, generator=draw, dtype=b.dtype)
            strategy.end(context, stage_of(STREAM, task))
        ranks = json.loads((folder / "adapters.json").read_text())
        assert (ranks["rank"], ranks["frozen"]) == ((12, 8) if form == "adapters" else (4, 0))
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(models["adapters"](ids).logits, models["weights"](ids).logits)
    fresh = lora_model().get_base_model().state_dict()
    kept, changed = (models[form].get_base_model().state_dict() for form in ("adapters", "weights"))
    under = [name for name in fresh if "base_layer" in name]
    assert under
    assert all(torch.equal(kept[name], fresh[name]) for name in fresh if ".lora_" not in name)
    assert not any(torch.equal(changed[name], fresh[name]) for name in under)


@pytest.mark.parametrize("form", ["adapters", "weights"])
def test_a_is_held_b_is_free_and_earlier_ranks_stay(form: str, tmp_path: Path) -> None:
    pulled = {}
    for pull in (0.0, 20.0):
        options = {"importance": INPUTS, "merge_lora": form, "mechanism": {"name": "anchor", "pull": pull}}
        strategy, model = strategy_of("attribution", **options), lora_model()
        strategy.check(model)
        learn(strategy, model, 0, tmp_path)
        strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
        factors = [f for pair in lora_factors(model) for f in pair]
        before = [f.detach().clone() for f in factors]
        optimizer = torch.optim.SGD(factors, lr=0.1)
        tell_total_rate(optimizer, None, 1)
        strategy.attach(model, optimizer)
        draw = torch.Generator().manual_seed(5)
        gradients = [torch.randn(f.shape, generator=draw, dtype=f.dtype) for f in factors]
        for f, gradient in zip(factors, gradients, strict=True):
            f.grad = gradient.clone()
        optimizer.step()
        frozen = 4 if form == "adapters" else 0
        pulled[pull] = [(f - old).detach() for f, old in zip(factors, before, strict=True)]
        for i, (change, gradient) in enumerate(zip(pulled[pull], gradients, strict=True)):
            new = (slice(frozen, None),) if i % 2 == 0 else (slice(None), slice(frozen, None))
            if i % 2 or pull == 0:
                torch.testing.assert_close(change[new], -0.1 * gradient[new])
            old = (slice(0, frozen),) if i % 2 == 0 else (slice(None), slice(0, frozen))
            assert not change[old].any()
    names = list(lora_layers(model))
    for i, name in enumerate(names):
        c = strategy.prior.tensors[name].double()  # type: ignore[attr-defined]
        free, held = pulled[0.0][2 * i], pulled[20.0][2 * i]
        values, u = torch.linalg.eigh(c * len(c) / c.trace())
        passed = 1 - (20 * values.clamp(min=0)).clamp(max=1)  # the whole pull in one step
        torch.testing.assert_close(held, free @ u @ torch.diag(passed) @ u.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["adapters", "weights"])
def test_drift_is_that_of_the_merged_maps(form: str, tmp_path: Path) -> None:
    strategy = strategy_of("attribution", importance=INPUTS, merge_lora=form)
    model = lora_model()
    strategy.check(model)
    learn(strategy, model, 0, tmp_path)
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    before = merged_maps(model)
    optimizer = torch.optim.SGD([f for pair in lora_factors(model) for f in pair], lr=0.1)
    strategy.attach(model, optimizer)
    train_by_chance(model, 9)
    after = merged_maps(model)
    moved = whole = 0.0
    got = strategy.drift()  # type: ignore[attr-defined]
    for name, w in before.items():
        c = strategy.prior.tensors[name].double()  # type: ignore[attr-defined]
        change = after[name] - w
        part, of = float((change @ c @ change.T).trace()), float((w @ c @ w.T).trace())
        assert got.maps[name] == pytest.approx(part / of, rel=1e-6)
        moved, whole = moved + part, whole + of
    assert got.total == pytest.approx(moved / whole, rel=1e-5)
    assert got.total > 0


def test_form_is_chosen_by_the_model() -> None:
    assert form_for(lora_model(), None, "attribution") == "adapters"
    assert form_for(lora_model(), "none", "attribution") is None
    assert form_for(tiny_model("llama"), None, "attribution") is None
    with pytest.raises(ConfigError, match=r"model\.lora"):
        form_for(tiny_model("llama"), "weights", "attribution")


def test_merging_without_the_importance_inputs_is_refused() -> None:
    options = {"name": "attribution", "importance": "fisher", "merge_lora": "weights"}
    with pytest.raises(ConfigError, match="importance: inputs"):
        strategy_of(**options)
    assert strategy_of("attribution", importance="fisher", merge_lora="none").options.merge_lora == "none"


def test_what_the_base_knows_is_held_from_the_first_task_on(tmp_path: Path) -> None:
    base = tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2).double()
    rows = context_of(base).encoder.many(STREAM.tasks[0].train[:4])
    compute_prior(base, rows, INPUTS, pad_id=TOKENIZER.pad_token_id).save(tmp_path / "prior")
    model, start = lora_model(), lora_factors(lora_model())
    strategy = strategy_of("attribution", importance=INPUTS, initial_prior=str(tmp_path / "prior"))
    strategy.check(model)
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 0))
    prior = strategy.prior.tensors  # type: ignore[attr-defined]
    assert prior.keys() == lora_layers(model).keys()
    for name, (a, _), (before, _) in zip(lora_layers(model), lora_factors(model), start, strict=True):
        torch.testing.assert_close(a, freed(before, prior[name], LORA_PULL))
    train_by_chance(model, 1)
    strategy.end(context_of(model, tmp_path), stage_of(STREAM, 0))
    factors = ImportancePrior({"x.lora_A.weight": torch.eye(4)}, {"kind": "inputs"})
    with pytest.raises(PriorMismatchError, match=r"without adapter.*merge_lora=none"):
        of_whole_maps(factors, model)


def test_recompressed_adapter_is_the_closest_of_its_rank(tmp_path: Path) -> None:
    model = lora_model(torch.float32)
    grow(model, 4, 1)
    train_by_chance(model, 2)
    model.save_pretrained(tmp_path)
    layers = lora_layers(model)
    exact = {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}
    left = recompress(tmp_path, 3)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), None
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"] / 3) == (3, 2.0)
    kept = whole = 0.0
    for name, delta in exact.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = (tensors[f"{stem}.lora_{f}.weight"].double() for f in "AB")
        u, s, v = torch.linalg.svd(delta)
        torch.testing.assert_close(2 * b @ a, u[:, :3] * s[:3] @ v[:3], atol=1e-6, rtol=1e-5)
        kept, whole = kept + float(s[:3].square().sum()), whole + float(s.square().sum())
    assert left == pytest.approx(kept / whole, rel=1e-5)
    with pytest.raises(ConfigError, match=r"has 3 ranks.*1 to 2"):
        recompress(tmp_path, 3)
