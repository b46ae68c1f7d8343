"""What a folder of skills brings back of a model that was made in a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from holdfast.errors import ModelError
from holdfast.learner import Learner
from holdfast.models import tiny_llama, unwrapped
from holdfast.names import canonical_name
from holdfast.tasks import toy_tokenizer
from learning_data import rows_of

TRAINING = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2}


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model that a folder holds, as an adapter's base must be one."""
    tokenizer = toy_tokenizer()
    if not folder.exists():
        tiny_llama(tokenizer, hidden=16, layers=1, heads=2).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def plain(folder: Path) -> Any:
    return base(folder)


def adapted(folder: Path) -> Any:
    return get_peft_model(base(folder), LoraConfig(r=2, target_modules=["q_proj"]))


def halves(folder: Path) -> Any:
    return base(folder, torch.bfloat16)


def adapted_halves(folder: Path) -> Any:
    return get_peft_model(base(folder, torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))


def mixed(folder: Path) -> Any:
    """16 bits, and norms in float32."""
    model = base(folder, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    return model


def compiled(folder: Path) -> Any:
    return torch.compile(plain(folder), backend="eager")


def compiled_adapted(folder: Path) -> Any:
    return torch.compile(adapted(folder), backend="eager")


def weights(model: Any) -> dict[str, Tensor]:
    return {canonical_name(n): p.detach().clone() for n, p in unwrapped(model).named_parameters()}


@pytest.mark.parametrize("given", [True, False], ids=["into a model", "by itself"])
@pytest.mark.parametrize(
    "make",
    [plain, adapted, halves, adapted_halves, mixed, compiled, compiled_adapted],
    ids=lambda m: m.__name__,
)
def test_weights_come_back_bit_for_bit_and_in_their_own_type(
    make: Callable[[Path], Any], given: bool, tmp_path: Path
) -> None:
    options = {**TRAINING, "precision": "bf16" if make is mixed else "full"}
    learner = Learner(
        make(tmp_path / "base"), toy_tokenizer(), "sequential", folder=tmp_path / "skills", training=options
    )
    with learner.task("one", rows_of("one", 8)) as stage:
        stage.train()
    learned = weights(learner.model)
    learner.close()
    model = (make(tmp_path / "base"), toy_tokenizer()) if given else ()
    again = Learner.load(tmp_path / "skills", *model)
    found = weights(again.model)
    again.close()
    types = {t.dtype for t in learned.values()}
    for name, weight in learned.items():
        assert torch.equal(found[name].double(), weight.double()), name
        if given or make is not mixed:
            assert found[name].dtype == weight.dtype, name
    assert make is not mixed or len(types) == 2


@pytest.mark.parametrize("how", ["the same", "another base", "a start drawn at random"])
def test_an_adapter_on_other_weights_than_it_was_learned_on_is_refused(how: str, tmp_path: Path) -> None:
    init: Any = "pissa_niter_2" if how == "a start drawn at random" else True
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    model = get_peft_model(base(tmp_path / "base"), config)
    learner = Learner(model, toy_tokenizer(), "sequential", folder=tmp_path / "skills", training=TRAINING)
    with learner.task("one", rows_of("one", 8)) as stage:
        stage.train()
    learner.close()
    if how == "another base":
        other = base(tmp_path / "base")
        other.get_parameter("model.norm.weight").data += 1
        other.save_pretrained(tmp_path / "base")
    if how == "the same":
        Learner.load(tmp_path / "skills").close()
        return
    with pytest.raises(ModelError, match=r"not the weights that 01-one in .* means nothing on others"):
        Learner.load(tmp_path / "skills")
