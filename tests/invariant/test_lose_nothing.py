"""The recipe of docs/how-to/lose-nothing.md: rated on the fresh adapter, trained under the rating, merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import holdfast
from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task
from holdfast.models import tiny_llama
from holdfast.tasks import Encoder, Task, Template, toy_suite, toy_tokenizer
from holdfast.training.loop import Collator, Rows

TOKENIZER = toy_tokenizer()
ENCODER = Encoder(TOKENIZER, Template(), encoder_decoder=False)


def score(model: Any, task: Task) -> float:
    return evaluate_task(model, TOKENIZER, task, ENCODER, options=EvaluationOptions()).score


def month(base: Any, known: Task, new: Task, steps: int, strength: float | None, folder: Path) -> Any:
    """The merged model."""
    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), lora)
    callbacks = []
    if strength is not None:
        prior = holdfast.attribute(model, TOKENIZER, known.train, importance="fisher", progress=False)
        rated = {name for name, tensor in prior.items() if tensor.any()}
        assert rated == {name for name in prior if ".lora_B." in name}, "B = 0 passes no gradient on to A"
        callbacks.append(holdfast.ProtectCallback(prior, strength=strength))
    collate = Collator(model, TOKENIZER)
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        seed=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    Trainer(
        model,
        args,
        train_dataset=Rows(ENCODER.many(new.train)),
        data_collator=lambda items: {k: v for k, v in collate(items).items() if k != "row_ids"},
        callbacks=callbacks,
    ).train()
    return model.merge_and_unload()


@pytest.mark.slow
def test_the_base_keeps_its_skill_and_learns_another_where_it_would_have_lost_it(tmp_path: Path) -> None:
    (known,), (new,) = toy_suite(["head"], 200, 32), toy_suite(["copy"], 200, 32)
    torch.manual_seed(0)
    base = tiny_llama(TOKENIZER, hidden=32, layers=2)
    training = {"epochs": 10, "batch_size": 16, "learning_rate": 1e-2}
    with holdfast.Learner(base, TOKENIZER, "sequential", training=training).task(
        "head", known.train
    ) as stage:
        stage.train()
    assert score(base, known) == 100
    plain = month(base, known, new, 100, None, tmp_path)
    assert (score(plain, known), score(plain, new)) == (0, 100)
    held = month(base, known, new, 300, 100, tmp_path)
    assert score(held, known) > 85
    assert score(held, new) > 75
