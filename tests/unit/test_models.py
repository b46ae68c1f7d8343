"""Loading, naming and counting of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from command_line import holdfast_cli
from holdfast.config import validate
from holdfast.errors import ConfigError, ModelError
from holdfast.importance import ImportancePrior
from holdfast.learner import LearnerConfig
from holdfast.models import (
    LoraOptions,
    ModelOptions,
    add_lora,
    block_parameters,
    digest,
    load_model,
    load_weights,
    save_model,
    tiny_llama,
)
from holdfast.names import canonical_name
from holdfast.tasks import toy_tokenizer


def toy(folder: Path) -> str:
    model, tokenizer = load_model(ModelOptions(toy=True, hidden=32, layers=2), 0, toy_tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.layers.0.mlp.up_proj.weight",
        "module.model.layers.0.mlp.up_proj.weight",
        "_orig_mod.model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.base_layer.weight",
    ],
)
def test_a_weight_has_one_name_whatever_wraps_it(wrapped: str) -> None:
    assert canonical_name(wrapped) == "model.layers.0.mlp.up_proj.weight"


def test_block_parameters_leave_out_norms_embeddings_and_head(tmp_path: Path) -> None:
    model, _ = load_model(ModelOptions(path=toy(tmp_path)))
    names = block_parameters(model)
    assert len(names) == 2 * 7
    assert all(name.startswith("model.layers.") and "norm" not in name for name in names)
    assert all(p.requires_grad == (id(p) in map(id, names.values())) for p in model.parameters())


def test_trainable_all_trains_every_weight(tmp_path: Path) -> None:
    model, _ = load_model(ModelOptions(path=toy(tmp_path), trainable="all"))
    assert all(p.requires_grad for p in model.parameters())


def test_adapter_folder_loads_on_its_base_and_only_the_adapter_is_trainable(tmp_path: Path) -> None:
    base = toy(tmp_path / "base")
    model, _ = load_model(ModelOptions(path=base, lora=LoraOptions(r=4)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load_model(ModelOptions(path=str(tmp_path / "adapter")))
    assert digest(again) == digest(model)
    assert {n.rsplit(".", 2)[-2] for n in block_parameters(again)} == {"lora_A", "lora_B"}
    with pytest.raises(ModelError, match="is an adapter already"):
        load_model(ModelOptions(path=str(tmp_path / "adapter"), lora=LoraOptions()))


@pytest.mark.parametrize("trainable", ["all", "blocks"])
def test_other_weights_than_an_adapters_cant_be_asked_for(trainable: str, tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter", toy(tmp_path / "base"))
    told = r"model: `trainable` does not apply to '.*adapter', which holds an adapter"
    values = {"strategy": "sequential", "model": {"path": path, "trainable": trainable}}
    with pytest.raises(ConfigError, match=told):
        validate(LearnerConfig, values, "test")


def test_an_adapter_is_attributed_from_its_folder(tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter", toy(tmp_path / "base"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "ab", "answer": "c"}\n' * 4)
    done = holdfast_cli(
        "attribute", "--model", path, "--data", data, "--out", tmp_path / "prior", "--importance", "fisher"
    )
    assert done.exit_code == 0, done.output
    prior = ImportancePrior.load(tmp_path / "prior")
    assert {name.rsplit(".", 2)[-2] for name in prior.tensors} == {"lora_A", "lora_B"}


def adapter(folder: Path, base: str, tokenizer=None, **options) -> str:
    """An adapter as PEFT saves it, with random factors."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if tokenizer is not None:
        model.resize_token_embeddings(len(tokenizer))
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **options)
    return str(folder)


def longer(folder: str):
    """The base's tokenizer with two tokens and a chat template of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    return tokenizer


def test_adapter_with_resized_embeddings_and_a_tokenizer_of_its_own_loads_with_both(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    base = toy(tmp_path / "base")
    tokenizer = longer(base)
    folder = adapter(tmp_path / "adapter", base, tokenizer)
    tokenizer.save_pretrained(folder)
    model, found = load_model(ModelOptions(path=folder))
    assert len(found) == len(tokenizer)
    assert found.chat_template == tokenizer.chat_template
    ids = torch.tensor([[5, len(tokenizer) - 1, 7]])
    expected = AutoPeftModelForCausalLM.from_pretrained(folder)(ids).logits
    assert model(ids).logits.shape[-1] == len(tokenizer)
    assert torch.equal(model(ids).logits, expected)
    assert model.get_input_embeddings().weight.requires_grad is False


def test_added_tokens_without_saved_embeddings_are_refused(tmp_path: Path) -> None:
    base = toy(tmp_path / "base")
    tokenizer = longer(base)
    folder = adapter(tmp_path / "adapter", base, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has \d+ tokens, but the base model has \d+ embeddings"):
        load_model(ModelOptions(path=folder))


def test_chat_template_beside_an_adapter_is_used_on_the_bases_tokenizer(tmp_path: Path) -> None:
    base = toy(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base)
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    _, tokenizer = load_model(ModelOptions(path=folder))
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}?"


def test_an_adapter_that_does_not_fit_its_base_is_told(tmp_path: Path) -> None:
    base = toy(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base)
    other, _ = load_model(ModelOptions(toy=True, hidden=64, layers=2), 0, toy_tokenizer)
    other.save_pretrained(base)
    with pytest.raises(ModelError, match=r"does not load on its base.*size mismatch"):
        load_model(ModelOptions(path=folder))


@pytest.mark.parametrize("other", ["second", "v2.1"])
def test_factors_of_two_adapters_have_two_names(other: str) -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    assert canonical_name(f"{stem}.default.weight") == "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert (
        canonical_name(f"{stem}.{other}.weight") == f"model.layers.0.self_attn.q_proj.lora_A.{other}.weight"
    )


def test_adapter_without_a_base_says_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="doesn't name its base model"):
        load_model(ModelOptions(path=str(tmp_path)))


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)])
def test_saved_weights_load_back_bit_identical(tmp_path: Path, lora: LoraOptions | None) -> None:
    base = toy(tmp_path / "base")
    model, _ = load_model(ModelOptions(path=base, lora=lora))
    with torch.no_grad():
        for parameter in block_parameters(model).values():
            parameter.normal_()
    model.save_pretrained(tmp_path / "saved")
    fresh, _ = load_model(ModelOptions(path=base, lora=lora))
    assert digest(fresh) != digest(model)
    load_weights(fresh, tmp_path / "saved")
    assert digest(fresh) == digest(model)


def test_missing_model_and_wrong_lora_target_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no Hugging Face model at '\./nowhere'"):
        load_model(ModelOptions(path="./nowhere"))
    with pytest.raises(ModelError, match=r"Linear modules here: .*q_proj"):
        load_model(ModelOptions(path=toy(tmp_path), lora=LoraOptions(target_modules=("quatsch",))))


def test_a_saved_adapter_is_the_same_file_whatever_the_process_hashes_to(tmp_path: Path) -> None:
    model = tiny_llama(toy_tokenizer(), hidden=16, layers=1, heads=2)
    model = add_lora(model, LoraOptions(r=2, target_modules="all-linear"))
    save_model(model, toy_tokenizer(), tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7  # in the order of a set they would be sorted once in 5,040 processes
    assert names == sorted(names)
