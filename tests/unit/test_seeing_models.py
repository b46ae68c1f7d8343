"""Models that see images too: loaded as a whole, of which the language model learns from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.config import validate
from holdfast.models import LoraOptions, ModelOptions, add_lora, load_model, text_part
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer
from model_families import SEEING, family
from tiny_runs import tiny_run

LORA = {"r": 2, "target_modules": "all-linear"}
PROCESSOR = {"processor_class": "Some"}


def stored(folder: Path, name: str) -> Path:
    tokenizer, model = toy_tokenizer(), family(name, torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config.get_text_config(), key, getattr(tokenizer, key))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen3_vl", "smolvlm"])
def test_all_of_it_is_loaded_and_text_s_part_is_trained(tmp_path: Path, name: str) -> None:
    """gemma3's and llama4's configurations are causal models' too, and llama4's of these has no eyes."""
    folder = stored(tmp_path / "model", name)
    model, _ = load_model(ModelOptions(path=str(folder)))
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert model.state_dict().keys() == family(name).state_dict().keys()
    read = {id(p) for p in text_part(model).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(id(p) in read for p in trained)
    assert len(read) < len(list(model.parameters()))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("q_proj", "lm_head")])
@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen3_vl"])
def test_lora_adapts_what_text_goes_through(tmp_path: Path, name: str, targets: Any) -> None:
    folder = stored(tmp_path / "model", name)
    model, _ = load_model(ModelOptions(path=str(folder), lora={"r": 2, "target_modules": targets}))
    read = {id(p) for p in text_part(model.get_base_model()).parameters()}
    factors = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("q_proj" in key for key in factors)
    at_head = [key for key in factors if "lm_head" in key]
    assert bool(at_head) == ("lm_head" in targets)
    assert all(id(model.get_parameter(key)) in read for key in factors if key not in at_head)


@pytest.mark.parametrize("name", ["llama4_text", "llama4"])
def test_a_router_that_is_no_map_gets_no_lora(tmp_path: Path, name: str) -> None:
    """llama4's is a linear layer that answers its choice too, which PEFT can't adapt."""
    model = add_lora(family(name, torch.float32), LoraOptions(r=2))
    factors = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("q_proj" in name for name in factors)
    assert not any("router" in name for name in factors)
    pattern = model.peft_config["default"].exclude_modules
    assert pattern.count("router") == 1, pattern
    model(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_run_learns_text_and_keeps_the_eyes(tmp_path: Path, lora: Any) -> None:
    folder = stored(tmp_path / "model", "qwen3_vl")
    values = tiny_run(
        tmp_path / "run",
        model={"path": str(folder), "lora": lora},
        strategy={"name": "attribution", "importance": {"name": "inputs", "samples": 4}},
        training={"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
    )
    assert run(validate(RunConfig, values, source="test"))["finished"]
    last = sorted((tmp_path / "run" / "tasks").iterdir())[-1] / "model"
    before, _ = load_model(ModelOptions(path=str(folder)))
    after, _ = load_model(ModelOptions(path=str(last)))
    after = after if lora is None else after.merge_and_unload()
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all("language_model" in name for name in changed)
    if lora is None:
        assert json.loads((last / "preprocessor_config.json").read_text()) == PROCESSOR


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEING)
def test_every_family_learns_from_text(tmp_path: Path, name: str) -> None:
    folder = stored(tmp_path / "model", name)
    values = tiny_run(tmp_path / "run", model={"path": str(folder)}, strategy="attribution")
    values["training"] |= {"max_steps": 2}
    assert run(validate(RunConfig, values, source="test"))["finished"]
