"""Loading, naming and counting of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.errors import ModelError
from holdfast.models import (
    LoraOptions,
    ModelOptions,
    block_parameters,
    digest,
    load_model,
    load_weights,
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
