"""A GGUF file is a model like any other: it is unpacked when it is loaded, trained, and saved as floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

from holdfast.config import validate
from holdfast.models import ModelOptions, load_model, save_model
from holdfast.runner import RunConfig, run
from tiny_gguf import tiny_gguf


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, tiny_gguf(file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_gguf_has_the_weights_it_stands_for_and_is_saved_as_floats(
    stored: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, dtype: Any, given: str
) -> None:
    file, weights = stored
    path = str(file if given == "file" else file.parent)
    model, tokenizer = load_model(ModelOptions(path=path, dtype=dtype))
    assert tokenizer.decode(tokenizer("cab and")["input_ids"]) == "cab and"
    save_model(model, tokenizer, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again, _ = load_model(ModelOptions(path=str(tmp_path / "saved"), dtype=dtype))
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor.to(getattr(torch, dtype))), name
        assert torch.equal(again.state_dict()[name], model.state_dict()[name]), name


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
def test_a_run_on_a_gguf_trains_it_and_what_it_saves_loads(
    stored: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, tiny: Any, lora: Any
) -> None:
    file, weights = stored
    rows = "".join(json.dumps({"prompt": f"{c}=", "completion": c}) + "\n" for c in "abcd")
    (tmp_path / "data.jsonl").write_text(rows)
    tasks = {"source": "hub", "tasks": {"a": {"path": str(tmp_path / "data.jsonl"), "test": "train"}}}
    values = tiny(
        tmp_path / "run",
        tasks={**tasks, "order": ["a"]},
        model={"path": str(file), "lora": lora},
        training={"max_steps": 2, "learning_rate": 1e-2},
    )
    run(validate(RunConfig, values, "test"))
    model, _ = load_model(ModelOptions(path=str(next((tmp_path / "run").glob("**/model")))))
    changed = model.state_dict()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
    if lora is None:
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(changed[name], weights[name])
    assert changed[name].abs().sum() > 0
