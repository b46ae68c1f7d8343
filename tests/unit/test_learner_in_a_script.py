"""What a script does around the learner's blocks: compiled models, modes, errors, frozen weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import Learner
from holdfast.errors import ConfigError, ModelError
from holdfast.models import block_parameters, tiny_llama
from holdfast.tasks import toy_tokenizer

TOKENIZER = toy_tokenizer()
OLD, NEW = ([{"prompt": f"{word} {x}=", "completion": x} for x in ("abc", "hfa", "dea")] for word in "ab")
TRAINING = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2}


def model_of() -> Any:
    torch.manual_seed(0)
    return tiny_llama(TOKENIZER, hidden=32, layers=2)


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.tensor([TOKENIZER("a abc=abc")["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def learned(model: Any, strategy: Any = "attribution", **options: Any) -> Learner:
    learner = Learner(model, TOKENIZER, strategy, training=TRAINING, **options)
    with learner.task("old", train=OLD) as stage:
        stage.train()
    return learner


def test_a_compiled_model_answers_as_the_plain_one_whatever_its_generation_settings() -> None:
    model = model_of()
    model.generation_config.do_sample = True
    said = []
    for each in (model, torch.compile(model, backend="eager")):
        with Learner(each, TOKENIZER, "sequential") as learner:
            said.append(learner.answer(["copy abc=", "b="], max_new_tokens=30))
    assert said[0] == said[1]
    assert max(map(len, said[0])) > 20
    assert model.generation_config.do_sample


def test_to_ask_in_the_middle_of_a_training_leaves_each_module_in_its_mode() -> None:
    model = model_of()
    with Learner(model, TOKENIZER, "sequential", training=TRAINING) as learner:
        model.train()
        model.model.layers[0].eval()  # as a script does that wants no dropout there
        modes = [module.training for module in model.modules()]
        learner.answer(["a="])
        assert [module.training for module in model.modules()] == modes


def test_an_error_of_the_script_s_own_comes_out_of_the_block_as_it_is(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"my_rows\.jsonl"),
        Learner(model_of(), TOKENIZER, training=TRAINING, folder=tmp_path / "skills") as learner,
        learner.task("old", train=OLD),
    ):
        (tmp_path / "my_rows.jsonl").open()


@pytest.mark.parametrize("strategy", ["attribution", "ewc", "kif"])
def test_weights_that_are_frozen_between_tasks_are_told_before_the_next_is_trained(strategy: str) -> None:
    model = model_of()
    learner = learned(model, strategy)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    message = (
        rf"other weights are trained than in 'old' \(9 are frozen now: model\.layers.*'{strategy}' keeps"
    )
    with pytest.raises(ConfigError, match=message), learner.task("new", train=NEW):
        raise AssertionError("the task began")
    for p in model.model.layers[0].parameters():
        p.requires_grad_(True)
    with learner.task("new", train=NEW) as stage:
        stage.train()


def test_a_method_that_keeps_nothing_lets_a_script_freeze_what_it_will() -> None:
    model = model_of()
    learner = learned(model, "sequential")
    model.model.layers[0].requires_grad_(False)
    with learner.task("new", train=NEW) as stage:
        stage.train()


def test_a_tokenizer_without_an_end_token_is_refused_beforehand() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no end token"):
        Learner(model_of(), tokenizer)


def test_several_trainings_of_a_task_say_nothing_of_another_model() -> None:
    model = model_of()
    held = {id(p) for p in block_parameters(model).values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in held)
    learner = learned(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with learner.task("new", train=NEW) as stage:
            for _ in range(2):
                trained = [p for p in model.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=1e-2)
                stage.attach(optimizer, steps=2)
                for _ in range(2):
                    step(model, optimizer)
