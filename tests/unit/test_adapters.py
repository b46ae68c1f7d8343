"""An adapter that grows is still a plain PEFT adapter with the same output; loading one of another rank."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from holdfast.errors import ConfigError, ModelError
from holdfast.models import (
    LoraOptions,
    accepts,
    add_lora,
    digest,
    float_type,
    load_weights,
    quantisation_of,
    save_model,
    tiny_llama,
)
from holdfast.models.adapters import check_growable, grow, is_quantised, lora_factors, rank_of, recompress
from holdfast.tasks import toy_tokenizer

TOKENIZER = toy_tokenizer()
KINDS = ["llama", "gpt2", "t5"]


def base_of(kind: str) -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id}
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **size))
    if kind == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        layers = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 32}
        return T5ForConditionalGeneration(T5Config(**layers, decoder_start_token_id=0, **size))
    return tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2)


def lora_of(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = add_lora(base_of(kind).to(dtype), LoraOptions(**{"r": 2, "alpha": 3.0, **options})).eval()
    with torch.no_grad():
        for _, b in lora_factors(model):
            b.normal_()  # as after training
    return model


def answer(model: Any, kind: str = "llama") -> Tensor:
    ids = torch.arange(10, 22).view(2, 6)
    extra = {"decoder_input_ids": ids[:, :3]} if kind == "t5" else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **extra).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_grown_adapter_keeps_its_factors_and_the_models_answer(kind: str) -> None:
    model = lora_of(kind, torch.float64)
    before = [(a.detach().clone(), b.detach().clone()) for a, b in lora_factors(model)]
    said, names = answer(model, kind), [n for n, p in model.named_parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns where an active adapter is deleted
        grow(model, 3, seed=7)
    after = lora_factors(model)
    assert rank_of(model) == 5
    assert len(after) == len(before) > 0
    for (a, b), (old_a, old_b) in zip(after, before, strict=True):
        assert torch.equal(a[:2], old_a)
        assert torch.equal(b[:, :2], old_b)
        assert a[2:].abs().min() > 0
        assert not b[:, 2:].any()
        assert a.requires_grad
        assert b.requires_grad
        assert a.dtype == torch.float64
    torch.testing.assert_close(answer(model, kind), said, rtol=1e-12, atol=1e-12)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names, "the same adapter, by name"
    assert list(model.peft_config) == ["default"]
    assert not any(module.training for module in model.modules())


def test_new_ranks_start_as_a_lora_of_their_own_does_and_by_seed_alone() -> None:
    one, other, third = lora_of(), lora_of(dropout=0.1), lora_of()
    alone = add_lora(base_of("llama"), LoraOptions(r=3), seed=7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for model, seed in ((one, 7), (other, 7), (third, 8)):
        grow(model, 3, seed)
    assert torch.equal(torch.get_rng_state(), state), "growing leaves the generator as it was"
    rows = zip(*(lora_factors(m) for m in (one, other, third, alone)), strict=True)
    for a, same, different, plain in rows:
        assert torch.equal(a.a[2:], same.a[2:])
        assert torch.equal(a.a[2:], plain.a)
        assert not torch.equal(a.a[2:], different.a[2:])


def test_gaussian_start_has_the_width_of_the_new_block_not_of_the_whole_adapter() -> None:
    from dataclasses import replace

    model = lora_of(r=64, target_modules=("q_proj",))
    model.peft_config["default"] = replace(model.peft_config["default"], init_lora_weights="gaussian")
    check_growable(model, "inc-lora")
    grow(model, 4, seed=0)
    spread = torch.cat([a.detach()[64:].flatten() for a, _ in lora_factors(model)]).std()
    assert math.isclose(float(spread), 1 / 4, rel_tol=0.25), "PEFT draws with a deviation of 1 / r"


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_adapter_answers_as_the_sum_of_separate_adapters(kind: str) -> None:
    model, separate = lora_of(kind, torch.float64), lora_of(kind, torch.float64)
    for number in (1, 2):
        grow(model, 2, seed=number)
        with torch.no_grad():
            for _, b in lora_factors(model):
                b[:, 2 * number :].normal_()
    for name, part in (("default", slice(0, 2)), ("second", slice(2, 4)), ("third", slice(4, 6))):
        if name != "default":
            separate.add_adapter(name, separate.peft_config["default"])
        with torch.no_grad():
            for to, whole in zip(lora_factors(separate, name), lora_factors(model), strict=True):
                to.a.copy_(whole.a[part])
                to.b.copy_(whole.b[:, part])
    separate.base_model.set_adapter(["default", "second", "third"])
    torch.testing.assert_close(answer(model, kind), answer(separate, kind), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_grown_adapter_is_loaded_by_plain_peft_and_into_a_model_of_the_first_rank(
    kind: str, tmp_path: Path
) -> None:
    model = lora_of(kind, r=3, alpha=0.1)
    grow(model, 3, seed=1)
    grow(model, 3, seed=2)
    save_model(model, TOKENIZER, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config["r"] == 9
    assert config["lora_alpha"] == pytest.approx(0.3)
    elsewhere = PeftModel.from_pretrained(base_of(kind), str(tmp_path / "model")).eval()
    assert torch.equal(answer(elsewhere, kind), answer(model, kind))
    again = lora_of(kind, r=3, alpha=0.1)
    load_weights(again, tmp_path / "model")
    assert digest(again) == digest(model)
    assert torch.equal(answer(again, kind), answer(model, kind)), "the scale too, to the last bit"
    assert again.peft_config["default"].lora_alpha == model.peft_config["default"].lora_alpha
    assert all(p.requires_grad == (".lora_" in n) for n, p in again.named_parameters())


def test_adapter_of_the_models_own_rank_is_loaded_into_the_same_parameters(tmp_path: Path) -> None:
    model, other = lora_of(), lora_of()
    with torch.no_grad():
        for a, _ in lora_factors(other):
            a.normal_()
    save_model(other, TOKENIZER, tmp_path / "model")
    before = {n: id(p) for n, p in model.named_parameters()}
    load_weights(model, tmp_path / "model")
    assert digest(model) == digest(other)
    assert {n: id(p) for n, p in model.named_parameters()} == before


# which adapters can grow


def peft_of(base: nn.Module | None = None, **values: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **values}
    return get_peft_model(base or base_of("llama"), LoraConfig(**config))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_grows_or_shrinks_keeps_the_scale_of_its_ranks(rslora: bool, tmp_path: Path) -> None:
    model = peft_of(use_rslora=rslora, lora_alpha=3).eval()
    check_growable(model, "inc-lora")
    with torch.no_grad():
        for _, b in lora_factors(model):
            b.normal_()
    before = answer(model, "llama")
    grow(model, 4, seed=1)
    torch.testing.assert_close(answer(model, "llama"), before)
    save_model(model, TOKENIZER, tmp_path)
    assert recompress(tmp_path, 2) == pytest.approx(1.0), "of six ranks two are not zero"
    again = PeftModel.from_pretrained(base_of("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(answer(again, "llama"), before)


def test_a_module_with_an_alpha_of_its_own_keeps_its_scale_when_ranks_are_taken_away(tmp_path: Path) -> None:
    model = peft_of(r=4, alpha_pattern={"v_proj": 12}, rank_pattern={"q_proj": 4}).eval()
    with torch.no_grad():
        for _, b in lora_factors(model):
            b[:, :2].normal_()
    before = answer(model, "llama")
    save_model(model, TOKENIZER, tmp_path)
    assert recompress(tmp_path, 2) == pytest.approx(1.0)
    again = PeftModel.from_pretrained(base_of("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(answer(again, "llama"), before)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules = an embedding"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters"),
    ],
    ids=["dora", "ranks", "embedding", "parameters"],
)
def test_adapter_whose_ranks_cannot_be_taken_away_is_refused_and_left(
    values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    peft_of(**values).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        ConfigError, match=r"can be recompressed, and this adapter has .*Leave the rank out"
    ) as got:
        recompress(tmp_path, 1)
    assert said in str(got.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_tensors_of_an_adapter_that_a_model_has_no_place_for_are_told(tmp_path: Path) -> None:
    save_model(peft_of(target_modules=["q_proj", "v_proj", "up_proj"]), TOKENIZER, tmp_path)
    with pytest.raises(ModelError, match=r"tensors of this adapter belong to nothing in the model.*up_proj"):
        load_weights(peft_of(), tmp_path)


def test_indices_in_a_float_layer_do_not_make_it_a_quantised_one() -> None:
    from peft import OFTConfig, get_peft_model

    config = OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base_of("llama"), config)
    assert not [name for name, module in model.named_modules() if is_quantised(module)]


def test_an_adapter_that_transformers_put_in_leaves_the_model_its_own_base() -> None:
    from peft import LoraConfig

    model = base_of("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert float_type(model) == "float32"
    assert quantisation_of(model) is None
    assert accepts(model, "input_ids")


def test_model_without_lora_is_refused_with_the_key_that_adds_it() -> None:
    with pytest.raises(ConfigError, match=r"strategy.name: 'o-lora' .* no LoRA. Set model.lora"):
        check_growable(base_of("llama"), "o-lora")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "lora_only"}, "bias = lora_only"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
        ({"init_lora_weights": False}, "init_lora_weights = False"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules = an embedding"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapter_that_is_more_than_the_sum_of_its_ranks_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="stacks the LoRAs of all tasks") as caught:
        check_growable(peft_of(**values), "inc-lora")
    assert said in str(caught.value)
    assert "Give a plain one (model.lora)" in str(caught.value)


def test_lora_bias_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_bias = True"):
        check_growable(peft_of(base_of("gpt2"), target_modules=["c_attn"], lora_bias=True), "inc-lora")


def test_several_adapters_and_other_kinds_of_adapters_are_refused() -> None:
    from peft import IA3Config, get_peft_model

    two = peft_of()
    two.add_adapter("second", two.peft_config["default"])
    with pytest.raises(ConfigError, match=r"has adapters \['default', 'second'\]"):
        check_growable(two, "inc-lora")
    with pytest.raises(ConfigError, match="has adapters"):
        check_growable(get_peft_model(base_of("llama"), IA3Config(task_type="CAUSAL_LM")), "inc-lora")


@pytest.mark.parametrize("targets", [None, "all-linear", ("q_proj",)])
def test_what_model_lora_makes_can_grow(targets: Any) -> None:
    model = lora_of(target_modules=targets)
    check_growable(model, "inc-lora")
    adapted = len(lora_factors(model))
    grow(model, 1, seed=0)
    assert len(lora_factors(model)) == adapted
