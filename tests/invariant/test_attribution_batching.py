"""A sample's map depends on the sample alone: not on its batch, its padding, or the number of passes."""

from __future__ import annotations

import pytest
import torch

from attribution_models import ROWS, Keep, build, lora, with_module_experts
from holdfast.attribution import AttributionOptions, attribute_batches, per_sample_gradients
from holdfast.errors import UnruledOperationError
from holdfast.importance import compute_prior
from holdfast.importance.aggregate import TopKMean
from holdfast.tasks.encode import Encoded
from model_families import family


def maps(model, *, gradients: bool = False, **arguments) -> dict[str, torch.Tensor]:
    fold = Keep()
    if gradients:
        per_sample_gradients(model, ROWS, fold=fold, pad_id=0, **arguments)
    else:
        rules = AttributionOptions(rules=arguments.pop("rules", "attnlrp"))
        attribute_batches(model, ROWS, options=rules, fold=fold, pad_id=0, correct_only=False, **arguments)
    return fold.maps


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    floor = 1e-3 * max(float(value.abs().max()) for value in one.values())  # a key's bias gets rounding only
    for name, value in one.items():
        scale = max(float(value.abs().max()), floor)
        assert (other[name] - value).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "t5"])
@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
def test_maps_do_not_depend_on_batch_size_or_padding_side(name: str, rules: str) -> None:
    model = build(name)
    alone = maps(model, rules=rules, batch_size=1)
    assert all(len(value) == len(ROWS) for value in alone.values())
    for size in (2, 3, 4):
        for side in ("left", "right"):
            assert_same(alone, maps(model, rules=rules, batch_size=size, padding_side=side))


def test_plain_gradients_do_not_depend_on_batch_size_or_padding_side() -> None:
    model = build("llama")
    alone = maps(model, gradients=True, batch_size=1)
    assert_same(alone, maps(model, gradients=True, batch_size=3))
    assert_same(alone, maps(model, gradients=True, batch_size=4, padding_side="right"))


@pytest.mark.parametrize("adapters", [False, True])
def test_a_memory_budget_makes_more_passes_with_the_same_result(adapters: bool) -> None:
    model = build("llama")
    if adapters:
        model = lora(model, ["q_proj", "down_proj"])
    results, passes = [], []
    for budget in (None, 40_000, 1):
        fold = TopKMean(2)
        report = attribute_batches(
            model, ROWS, fold=fold, pad_id=0, correct_only=False, batch_size=2, memory_budget=budget
        )
        results.append(fold.result())
        passes.append(report.passes)
        assert (report.samples_seen, report.samples_used) == (4, 4)
    assert passes[0] == 1
    assert passes[-1] == len(results[0])
    for other in results[1:]:
        assert set(other) == set(results[0])
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_max_samples_counts_used_samples_and_stops() -> None:
    model, fold = build("llama"), Keep()
    report = attribute_batches(
        model, ROWS * 2, fold=fold, pad_id=0, correct_only=False, batch_size=2, max_samples=3
    )
    assert (report.samples_seen, report.samples_used) == (4, 3)
    whole = maps(model)
    assert_same({name: value[:3] for name, value in whole.items()}, fold.maps)


def test_a_weight_used_twice_gets_the_sum_of_both_uses_as_one_map() -> None:
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    fold = Keep()
    report = attribute_batches(model, ROWS, fold=fold, pad_id=0, correct_only=False)
    assert report.conservation_max_relative_error < 1e-9
    assert len(fold.maps["model.layers.0.mlp.up_proj.weight"]) == len(ROWS)


@pytest.mark.parametrize("gradients", [False, True], ids=["relevance", "gradients"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_weights_that_lie_in_one_storage_are_told_apart(name: str, gradients: bool) -> None:
    """As `torch.nn.utils.vector_to_parameters` and the flat buffers of DeepSpeed leave them."""
    model, flat = build(name), build(name)
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(flat.parameters()), flat.parameters()
    )
    assert len({p.untyped_storage().data_ptr() for p in flat.parameters()}) == 1
    assert_same(maps(model, gradients=gradients), maps(flat, gradients=gradients))
    priors = [
        compute_prior(m, ROWS, {"name": "inputs", "correct_only": False}, pad_id=0) for m in (model, flat)
    ]
    assert_same(priors[0].tensors, priors[1].tensors)
    assert all(tensor.any() for tensor in priors[1].tensors.values())


def test_several_weights_of_a_storage_used_as_one_are_refused_by_name() -> None:
    model = build("llama")
    attention = model.model.layers[0].self_attn
    both = torch.cat([attention.k_proj.weight.detach(), attention.v_proj.weight.detach()])
    attention.k_proj.weight.data, attention.v_proj.weight.data = both.chunk(2)

    def fused(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, both)[..., : len(both) // 2]

    attention.k_proj.forward = fused
    with pytest.raises(UnruledOperationError, match=r"'linear' has no attribution rule.*several in one"):
        maps(model)


def moments(model, size: int, weighting: str, monkeypatch, rows=ROWS) -> dict[str, torch.Tensor]:
    monkeypatch.setattr("holdfast.importance.inputs.FULL_PASS", 1)
    only = {"correct_only": False} if weighting in ("relevance", "gradient") else {}
    options = {"name": "inputs", "weighting": weighting, "batch_size": size, **only}
    return compute_prior(model, rows, options, pad_id=0).tensors


def assert_rounding(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        assert (other[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-12, name


OF_ONE_LENGTH = [Encoded([1, 5 + i, 6 + i, 20 - i], [30 + i, 40 - i]) for i in range(4)]


@pytest.mark.parametrize("weighting", ["relevance", "gradient", "loss_gradient", "uniform", "answer"])
@pytest.mark.parametrize("experts", [2, 5])
def test_inputs_of_experts_that_are_modules_do_not_depend_on_the_batch(
    experts: int, weighting: str, monkeypatch
) -> None:
    model = with_module_experts(experts)
    for rows in (ROWS, OF_ONE_LENGTH):
        alone, together = (moments(model, size, weighting, monkeypatch, rows) for size in (1, 4))
        assert any("experts" in name and value.any() for name, value in alone.items())
        assert_rounding(alone, together)


@pytest.mark.parametrize("weighting", ["uniform", "answer"])
@pytest.mark.parametrize("name", ["xlstm", "paligemma", "fsmt", "switch_transformers", "rwkv"])
def test_inputs_without_relevance_do_not_depend_on_the_batch(name: str, weighting: str, monkeypatch) -> None:
    """Padding leaks, comes first, or changes the length; experts are given rows of all samples."""
    model = family(name, torch.float32)
    for rows in (ROWS, OF_ONE_LENGTH):
        alone, together = (moments(model, size, weighting, monkeypatch, rows) for size in (1, 4))
        assert_rounding(alone, together)


def test_rows_of_one_length_go_through_an_ordinary_model_together(monkeypatch) -> None:
    model, sizes = build("llama"), list[int]()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    moments(model, 4, "uniform", monkeypatch, OF_ONE_LENGTH + ROWS)
    # three of ROWS are as long as those four; one goes alone, to see that its batch does not mix it
    assert sorted(sizes) == [1, 1, 3, 4]


def test_tokens_that_a_batch_mixes_are_found_and_taken_one_sample_at_a_time(monkeypatch) -> None:
    model = build("llama")
    for layer in model.model.layers:
        own = layer.mlp.forward

        def reversed_rows(x: torch.Tensor, own=own) -> torch.Tensor:
            return own(x.reshape(-1, x.shape[-1]).flip(0)).flip(0).view(x.shape)

        layer.mlp.forward = reversed_rows
    alone, together = (moments(model, size, "relevance", monkeypatch) for size in (1, 4))
    assert_rounding(alone, together)
