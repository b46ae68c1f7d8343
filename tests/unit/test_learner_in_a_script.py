"""What a script does around the learner's blocks: compiled models, modes, errors, frozen weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from holdfast import Learner
from holdfast.errors import ConfigError, DataError, ModelError
from holdfast.learner.skills import read_skills
from holdfast.models import block_parameters, tiny_llama
from holdfast.runner.ask import lost_of
from holdfast.tasks import as_examples, as_questions, toy_tokenizer
from holdfast.tasks.task import Task

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


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("june", {"metric": "f1"}, r"task 'june': there is no metric 'f1'; allowed: exact_match, "),
        ("june", {"metric": "options"}, r"'options' needs the allowed answers: options=\[\.\.\.\]"),
        ("june", {"metric": "options", "options": ["x", "y"]}, "the answer 'abc' is none of its options"),
        ("june", {"options": ["abc"]}, "`options` do nothing with the metric 'exact_match'"),
        ("june", {"about": {"when": object()}}, "task 'june': `about` can't be kept as JSON"),
        (202406, {}, "its name is 202406; give a text"),
        (" ", {}, "its name is ' '"),
    ],
)
def test_what_a_task_cannot_be_scored_or_called_by_is_told_before_it_begins(
    name: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with Learner(model_of(), TOKENIZER, "sequential", folder=tmp_path / "s") as learner:
        with pytest.raises((ConfigError, DataError), match=message), learner.task(name, OLD, OLD, **options):
            pytest.fail("the block began")
        assert not list((tmp_path / "s").rglob("*.partial"))


def test_remarks_stand_beside_what_is_known_of_a_task_and_replace_nothing(tmp_path: Path) -> None:
    about = {"name": "Bob", "metric": "accuracy"}
    with (
        Learner(model_of(), TOKENIZER, "sequential", training=TRAINING, folder=tmp_path / "s") as learner,
        learner.task("june", OLD, OLD, about=about) as stage,
    ):
        stage.train()
    kept = json.loads(next((tmp_path / "s").rglob("task.json")).read_text())
    assert (kept["name"], kept["metric"], kept["about"]) == ("june", "exact_match", about)
    with Learner.load(tmp_path / "s", model_of(), TOKENIZER) as again, again.task("july", NEW) as stage:
        stage.train()
    assert [skill.name for skill in read_skills(tmp_path / "s").skills] == ["june", "july"]


def test_a_learner_is_asked_the_rows_it_is_given_whatever_a_task_of_that_name_had(tmp_path: Path) -> None:
    with Learner(model_of(), TOKENIZER, "sequential", training=TRAINING) as learner:
        with learner.task("june", OLD, OLD[:2]) as stage:
            stage.train()
        others = Task("june", (), as_examples(NEW))
        learner.evaluate([others], tmp_path / "asked")
        lines = next((tmp_path / "asked").rglob("*.jsonl")).read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == [row["prompt"] for row in NEW]
        with pytest.raises(DataError, match=r"no test rows to ask in june"):
            learner.evaluate([Task("june", (), ())], tmp_path / "none")


def test_a_question_longer_than_the_context_is_refused_and_one_that_leaves_little_room_is_told() -> None:
    config = GPT2Config(vocab_size=len(TOKENIZER), n_positions=40, n_embd=16, n_layer=1, n_head=2)
    template = {"max_prompt_tokens": 100, "max_completion_tokens": 20}
    with Learner(GPT2LMHeadModel(config), TOKENIZER, "sequential", template=template) as learner:
        short, long = "ab" * 5, "ab" * 15
        alone = learner.answer([short])
        assert learner.answer([short, long])[:1] == alone
        with pytest.raises(
            DataError, match=r"1 of 2 questions, first number 2, have more tokens than .* \(40\)"
        ):
            learner.answer([short, "ab" * 30])
        (told,) = lost_of(learner, as_questions([short, long]))
    assert told.startswith("1 of 2 questions leave fewer than 20 tokens to their answer: the model takes 40")
