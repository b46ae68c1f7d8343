"""accelerate leaves a model that was trained in 16 bits under autocast: what comes after doesn't see it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import holdfast
from holdfast import Learner
from holdfast.config import validate
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer
from learning_data import rows_of, same
from strategy_runs import METHODS, needs_lora, options_of
from tiny_models import tiny_model
from tiny_runs import tiny_run

TRAINING = {"precision": "bf16", "max_steps": 6, "batch_size": 4, "learning_rate": 1e-3}
ALIKE = {"name": "inputs", "weighting": "uniform"}


def learner_in(folder: Path, **sections: Any) -> Learner:
    return Learner(tiny_model("llama"), toy_tokenizer(), folder=folder, **sections)


def learn(learner: Learner, name: str) -> None:
    with learner.task(name, rows_of(name, 12), rows_of(name, 3)) as stage:
        stage.train()


def test_a_learner_that_goes_on_is_one_that_was_opened_again(tmp_path: Path) -> None:
    found = []
    with learner_in(tmp_path / "at-once", training=TRAINING) as learner:
        for name in ("may", "june"):
            learn(learner, name)
            assert "_original_forward" not in learner.model.__dict__
        found.append({name: p.detach().clone() for name, p in learner.model.named_parameters()})
    for name in ("may", "june"):
        with learner_in(tmp_path / "apart", training=TRAINING) as learner:
            learn(learner, name)
            found.append({name: p.detach().clone() for name, p in learner.model.named_parameters()})
    at_once, _, apart = found
    assert same(at_once, apart)


def test_a_trainer_with_trl_s_defaults_learns_a_task(tmp_path: Path) -> None:
    arguments = SFTConfig(str(tmp_path / "trl"), max_steps=2, report_to="none", use_cpu=True)
    assert arguments.bf16  # TRL's own default
    with learner_in(tmp_path / "s") as learner:
        with learner.task("may", rows_of("may", 12)) as stage:
            stage.trainer(SFTTrainer, args=arguments).train()
        assert learner.learned == ["may"]


def test_what_a_loop_of_ones_own_prepared_stays_prepared(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with learner_in(tmp_path) as learner:
        model = accelerator.prepare(learner.model)
        seen = []
        for name in ("may", "june"):
            with learner.task(name, rows_of(name, 4)) as stage:
                optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.1)
                stage.attach(optimizer, steps=1)
                batch = stage.collate([stage.numbered[i] for i in range(4)])
                batch.pop("row_ids")
                hook = learner.model.model.layers[0].mlp.register_forward_hook(
                    lambda module, given, output: seen.append(output.dtype)
                )
                model(**batch).loss.backward()
                optimizer.step()
                hook.remove()
    assert seen == [torch.bfloat16] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_strategy_learns_three_tasks(name: str, tmp_path: Path) -> None:
    short = {"max_steps": 4, "batch_size": 8, "learning_rate": 3e-3, "precision": "bf16"}
    values = tiny_run(tmp_path / "run", strategy=options_of(name), training=short)
    values["template"] = {**values.get("template", {}), "max_prompt_tokens": 16, "max_completion_tokens": 8}
    if needs_lora(name):
        values["model"] = {**values["model"], "lora": {"r": 4}}
    assert run(validate(RunConfig, values, source="test"))["finished"]


@pytest.mark.parametrize("importance", ["inputs", "fisher", "lrp", ALIKE])
def test_a_model_of_somebodys_trainer_is_rated_like_its_weights(tmp_path: Path, importance: Any) -> None:
    tokenizer, model = toy_tokenizer(), tiny_model("llama")
    ids = torch.randint(3, 30, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    quiet: Any = {"report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, bf16=True, use_cpu=True, **quiet)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    assert "_original_forward" in model.__dict__  # or there is nothing to see here
    plain = copy.deepcopy(tiny_model("llama"))
    plain.load_state_dict(model.state_dict())
    found = [
        holdfast.attribute(one, tokenizer, rows_of("may", 4), importance=importance, progress=False)
        for one in (model, plain)
    ]
    assert same(found[0].tensors, found[1].tensors)
    assert "_original_forward" in model.__dict__  # left as it was: its trainer may go on


def test_a_callers_autocast_is_not_seen() -> None:
    tokenizer, model = toy_tokenizer(), tiny_model("llama")
    plain = holdfast.attribute(model, tokenizer, rows_of("may", 4), progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        under = holdfast.attribute(model, tokenizer, rows_of("may", 4), progress=False)
    assert same(plain.tensors, under.tensors)
