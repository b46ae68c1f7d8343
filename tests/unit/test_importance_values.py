"""Each importance against a slow, obvious computation of the same number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.errors import ConfigError, DataError, ModelError
from holdfast.importance import ImportanceOptions, compute_prior
from holdfast.importance.lrp import LrpOptions
from holdfast.importance.prior import ImportancePrior, trained_parameters
from holdfast.importance.registry import REGISTRY
from holdfast.models import block_parameters, digest
from holdfast.tasks.encode import Encoded


def tiny_model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=dropout,
            attention_bias=True,
            initializer_range=0.3,
        )
    ).double()


def rows(count: int = 7) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 20, (length,), generator=generator).tolist()

    return [Encoded(ids(2 + i % 4), ids(1 + i % 3)) for i in range(count)]


def gradients(model: nn.Module, row: Encoded) -> dict[str, Tensor]:
    """Gradient of the answer's log-likelihood: one sample, no padding, plain autograd."""
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    logits = model(input_ids=ids).logits[0]
    start = len(row.prompt_ids)
    likelihood = logits[start - 1 : -1].log_softmax(-1)[range(len(row.completion_ids)), ids[0, start:]].sum()
    parameters = trained_parameters(model)
    return dict(zip(parameters, torch.autograd.grad(likelihood, list(parameters.values())), strict=True))


def assert_equals(prior: ImportancePrior, expected: dict[str, Tensor]) -> None:
    assert prior.tensors.keys() == expected.keys()
    for name, tensor in prior.tensors.items():
        assert tensor.dtype == torch.float32
        wanted = expected[name].float()  # sums are in float32
        small = 1e-6 * float(wanted.abs().max())
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=small, msg=name)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_fisher_is_the_mean_squared_gradient_of_single_samples(batch_size: int) -> None:
    model, data = tiny_model(), rows()
    each = [gradients(model, row) for row in data]
    expected = {n: torch.stack([g[n] ** 2 for g in each]).mean(0) for n in each[0]}
    prior = compute_prior(model, data, {"name": "fisher", "batch_size": batch_size}, pad_id=0)
    assert_equals(prior, expected)
    assert prior.meta["samples_used"] == len(data)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_taylor_is_the_mean_of_weight_times_gradient(batch_size: int) -> None:
    model, data = tiny_model(), rows()
    each = [gradients(model, row) for row in data]
    weights = trained_parameters(model)
    expected = {n: torch.stack([(weights[n] * g[n]).abs() for g in each]).mean(0).detach() for n in each[0]}
    assert_equals(
        compute_prior(model, data, {"name": "taylor", "batch_size": batch_size}, pad_id=0), expected
    )


@pytest.mark.parametrize("name", ["fisher", "taylor", "lrp"])
def test_importance_does_not_depend_on_the_mode_and_leaves_the_model_alone(name: str) -> None:
    model, data = tiny_model(dropout=0.5), rows()
    options = {"name": name} | ({"correct_only": False} if name == "lrp" else {})
    model.eval()
    expected = compute_prior(model, data, options, pad_id=0)
    model.train()
    before, state = digest(model), torch.random.get_rng_state()
    prior = compute_prior(model, data, options, pad_id=0)
    assert_equals(prior, expected.tensors)
    assert model.training
    assert digest(model) == before == prior.meta["model_digest"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_samples_are_drawn_by_the_seed() -> None:
    model, data = tiny_model(), rows(9)

    def fisher(seed: int) -> Tensor:
        prior = compute_prior(model, data, {"name": "fisher", "samples": 4}, pad_id=0, seed=seed)
        assert prior.meta["samples_seen"] == 4
        return torch.cat([t.flatten() for t in prior.tensors.values()])

    assert torch.equal(fisher(0), fisher(0))
    assert not torch.equal(fisher(0), fisher(1))


def test_fisher_and_taylor_fold_the_same_gradient_of_the_same_sample() -> None:
    model, data = tiny_model(), rows(9)
    weights = trained_parameters(model)
    fisher, taylor = (
        compute_prior(model, data, {"name": name, "samples": 1}, pad_id=0, seed=5).tensors
        for name in ("fisher", "taylor")
    )
    for name, value in taylor.items():
        torch.testing.assert_close(value, fisher[name].sqrt() * weights[name].detach().float().abs())


def test_magnitude_and_uniform_need_no_data() -> None:
    model = tiny_model()
    weights = trained_parameters(model)
    assert_equals(
        compute_prior(model, [], "magnitude", pad_id=0), {n: p.detach().abs() for n, p in weights.items()}
    )
    assert_equals(
        compute_prior(model, [], "uniform", pad_id=0), {n: torch.ones_like(p) for n, p in weights.items()}
    )


def test_random_depends_on_seed_and_name_and_not_on_its_company() -> None:
    model = tiny_model()
    weights = block_parameters(model)
    one = compute_prior(model, [], "random", pad_id=0, seed=5)
    other = compute_prior(model, [], "random", pad_id=0, seed=6)
    name = list(weights)[-1]
    alone = compute_prior(model, [], "random", pad_id=0, seed=5, parameters={name: weights[name]})
    values = torch.cat([t.flatten() for t in one.tensors.values()])
    assert 0 <= float(values.min()) < 0.05 < 0.95 < float(values.max()) < 1
    assert torch.equal(alone.tensors[name], one.tensors[name])
    assert not torch.equal(one.tensors[name], other.tensors[name])


@pytest.mark.parametrize(
    "options", [{"aggregate": "topk", "top_k": 2, "per_weight": False}, {"aggregate": "absolute"}, {}]
)
def test_lrp_records_how_it_was_made(options: dict[str, Any]) -> None:
    model, data = tiny_model(), rows()
    prior = compute_prior(
        model, data, {"name": "lrp", "correct_only": False, **options}, pad_id=0, task="toy", seed=2
    )
    assert prior.meta["importance"] == "lrp"
    assert prior.meta["tasks"] == ["toy"]
    assert prior.meta["samples_seen"] == prior.meta["samples_used"] == len(data)
    assert prior.meta["conservation_max_relative_error"] < 1e-9
    assert prior.meta["options"] == LrpOptions(correct_only=False, **options).model_dump(exclude={"name"})
    prior.check_fits(model)
    assert max(float(t.abs().max()) for t in prior.tensors.values()) > 0


def test_lrp_of_lora_rates_the_factors_alone() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, init_lora_weights=False)).double()
    prior = compute_prior(adapted, rows(), {"name": "lrp", "correct_only": False}, pad_id=0)
    assert prior.tensors
    assert all("lora_" in name for name in prior.tensors)
    prior.check_fits(adapted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nothing", "no importance 'nothing'. Allowed: fisher, inputs, lrp"),
        ({"samples": 3}, "no importance None"),
        ({"name": "magnitude", "samples": 3}, "samples: unknown key"),
        ({"name": "lrp", "top_k": 3}, "`top_k` applies to `aggregate: topk` only"),
        ({"name": "fisher", "batch_size": 0}, "batch_size: .*greater than or equal to 1"),
    ],
)
def test_wrong_options_are_named(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compute_prior(tiny_model(), rows(), options, pad_id=0)


def test_empty_data_and_frozen_models_are_errors() -> None:
    model = tiny_model()
    with pytest.raises(DataError, match="importance 'fisher': the data set is empty"):
        compute_prior(model, [], "fisher", pad_id=0)
    model.requires_grad_(False)
    with pytest.raises(ModelError, match=r"'fisher': \w+ has no trainable weight\. Unfreeze some\.$"):
        compute_prior(model, rows(), "fisher", pad_id=0)
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ModelError, match=r"no trainable linear map in .* or rate .* by one of fisher, "):
        compute_prior(model, rows(), "inputs", pad_id=0)


def test_inputs_of_an_adapter_without_a_linear_map_of_its_own_are_refused() -> None:
    from peft import OFTConfig, get_peft_model

    config = OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    assert block_parameters(model)
    with pytest.raises(ModelError, match=r"'inputs': .* no trainable linear map in .* by one of fisher, "):
        compute_prior(model, rows(), "inputs", pad_id=0)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_registered_importance_is_a_word_in_the_config(name: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ImportanceOptions)
    options = adapter.validate_python(name)
    assert type(options) is REGISTRY[name].options
    assert adapter.validate_python(options.model_dump()) == options  # the resolved config can be read again
    with pytest.raises(ValidationError):
        adapter.validate_python({"name": name, "unknown": 1})


@pytest.mark.parametrize("name", ["lrp", "inputs", "fisher", "taylor"])
@pytest.mark.filterwarnings("ignore:attribution. the model is in bfloat16")
def test_importances_of_16_bit_weights_rank_as_those_of_float64(name: str) -> None:
    """Both of the same rounded weights: sums are float32 at least, and only the passes are of 16 bits."""
    options = {} if name in ("fisher", "taylor") else {"correct_only": False}
    rounded = tiny_model().bfloat16()
    narrow, wide = (
        compute_prior(model, rows(), {"name": name, **options}, pad_id=0).tensors
        for model in (rounded, copy.deepcopy(rounded).double())
    )
    for key, exact in wide.items():
        ranks = torch.stack([t.abs().flatten().argsort().argsort().float() for t in (narrow[key], exact)])
        if ranks.shape[1] > 30:
            assert torch.corrcoef(ranks)[0, 1] > 0.95, key
