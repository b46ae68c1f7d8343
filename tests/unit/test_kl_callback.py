"""KLCallback: how far somebody's own training moves a model, in its log, at no change to the training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import holdfast
from holdfast.errors import ConfigError
from holdfast.evaluation.general import encode_own, own_rows
from holdfast.models import add_lora
from holdfast.models.options import LoraOptions
from holdfast.tasks import toy_tokenizer
from holdfast.training.kl_callback import KLCallback, first_rows
from tiny_models import tiny_model

TOKENIZER = toy_tokenizer()


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Prompts of three tokens and answers of five; the padding behind one row is no token of either."""
    ids = torch.randint(4, 40, (count, 8), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :3] = -100
    there = torch.ones_like(ids)
    there[1, 6:], labels[1, 6:] = 0, -100
    return [
        {"input_ids": i, "labels": label, "attention_mask": mask}
        for i, label, mask in zip(ids, labels, there, strict=True)
    ]


def trainer_of(folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any) -> Trainer:
    values: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    return Trainer(
        tiny_model("llama") if model is None else model,
        TrainingArguments(**(values | options)),
        train_dataset=rows(),
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
    )


@torch.no_grad()
def divergence_by_hand(before: Any, now: Any, asked: list[tuple[list[int], list[int]]]) -> float:
    """Mean KL at the answers' tokens, one row at a time, in float64."""
    total, count = 0.0, 0
    for prompt, answer in asked:
        ids = torch.tensor([prompt + answer])
        log_p, log_q = (
            m(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (before, now)
        )
        total, count = total + float((log_p.exp() * (log_p - log_q)).sum()), count + len(answer)
    return total / count


def test_both_figures_are_the_divergence_from_the_model_before_its_first_step(tmp_path: Path) -> None:
    model, callback = tiny_model("llama"), KLCallback(rows=5)
    before = copy.deepcopy(model).eval()
    trainer = trainer_of(tmp_path, callback, model=model)
    trainer.train()
    model.eval()
    (middle, last) = callback.history
    assert [middle["step"], last["step"]] == [3, 6]
    own = encode_own(own_rows(before, TOKENIZER, 5, 0), TOKENIZER, False)
    by_hand = divergence_by_hand(before, model, [(row.prompt_ids, row.completion_ids) for row in own])
    assert last["kl_base"] == pytest.approx(by_hand, rel=1e-3)
    there = [row["input_ids"][row["attention_mask"].bool()].tolist() for row in rows()[:5]]
    assert last["kl_new"] == pytest.approx(
        divergence_by_hand(before, model, [(ids[:3], ids[3:]) for ids in there]), rel=1e-3
    )
    assert last["kl_base"] > middle["kl_base"] > 0


def test_the_log_has_them_once_a_measurement_the_last_beside_the_whole_trainings(tmp_path: Path) -> None:
    callback = KLCallback(rows=4)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "kl_new" in line]
    assert [(line["kl_base"], line["kl_new"]) for line in logged] == [
        (found["kl_base"], found["kl_new"]) for found in callback.history
    ]
    assert "train_runtime" in logged[-1]


def test_a_training_goes_the_same_way_with_it(tmp_path: Path) -> None:
    with_it, without = trainer_of(tmp_path / "a", KLCallback(rows=4)), trainer_of(tmp_path / "b")
    for trainer in (with_it, without):
        trainer.model.config.attention_dropout = 0.5  # draws from torch's generator in each step
        trainer.train()
    other = dict(without.model.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in with_it.model.named_parameters())


def test_a_resumed_training_measures_from_before_its_first_step(tmp_path: Path) -> None:
    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = KLCallback(rows=4), KLCallback(rows=4)
    trainer_of(tmp_path / "whole", whole, **saving).train()
    trainer_of(tmp_path / "parts", KLCallback(rows=4), StopAt(), **saving).train()
    moved = trainer_of(tmp_path / "other").model  # the trainer need not be made with the model of then
    trainer_of(tmp_path / "parts", resumed, model=moved, **saving).train(resume_from_checkpoint=True)
    assert resumed.history[-1] == whole.history[-1]


def test_a_checkpoint_without_it_is_told(tmp_path: Path) -> None:
    trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    callback = KLCallback(rows=4)
    with pytest.warns(UserWarning, match=r"checkpoint-2.*missing, so KL is measured from the checkpoint's"):
        trainer_of(tmp_path, callback).train(resume_from_checkpoint=True)
    assert callback.history[-1]["kl_base"] > 0


def test_each_training_that_it_is_given_to_is_measured_from_its_own_model(tmp_path: Path) -> None:
    callback = KLCallback(rows=4)
    first, second = trainer_of(tmp_path / "a", callback), trainer_of(tmp_path / "b", callback)
    first.train()
    alone = callback.history
    second.train()
    assert callback.history == alone


def test_what_is_held_moves_less(tmp_path: Path) -> None:
    data = [holdfast.Example("ab: ", "cd") for _ in range(4)]
    moved = []
    for held in (False, True):
        model, callback = tiny_model("llama"), KLCallback(rows=8)
        hold = []
        if held:
            prior = holdfast.attribute(model, TOKENIZER, data, importance="uniform")
            hold = [holdfast.ProtectCallback(prior, "gate")]
        trainer_of(tmp_path / str(held), callback, *hold, model=model).train()
        moved.append(callback.history[-1]["kl_new"])
    assert moved[1] < 0.5 * moved[0]


def test_a_new_lora_is_measured_from_its_base(tmp_path: Path) -> None:
    model = add_lora(tiny_model("llama"), LoraOptions(r=2), 0)
    callback = KLCallback(rows=4)
    trainer_of(tmp_path, callback, model=model, learning_rate=0.0).train()
    assert callback.history[-1] == pytest.approx({"step": 6, "kl_base": 0.0, "kl_new": 0.0}, abs=1e-6)


def test_an_sft_trainer_is_measured_on_its_completions(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": "ab: ", "completion": "cde"}] * 4)
    arguments = SFTConfig(
        str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callback = KLCallback(rows=2)
    trainer = SFTTrainer(
        tiny_model("llama"), arguments, train_dataset=data, processing_class=toy_tokenizer(),
        callbacks=[callback],
    )  # fmt: skip
    answers = [row.completion_ids for row in first_rows(trainer.train_dataset, 2, False)]
    assert [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in answers] == ["cde"] * 2
    trainer.train()
    assert callback.history[-1]["kl_new"] > 0


def test_an_encoder_decoder_is_measured(tmp_path: Path) -> None:
    model, callback = tiny_model("t5"), KLCallback(rows=4)
    data = [{"input_ids": row["input_ids"], "labels": row["labels"][3:]} for row in rows()]
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=data,
        processing_class=TOKENIZER,
        data_collator=DataCollatorForSeq2Seq(TOKENIZER, model),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.history[-1]["kl_new"] > 0


def test_rows_that_cant_be_looked_at_leave_its_own(tmp_path: Path) -> None:
    assert first_rows(iter(rows()), 4, False) == []
    assert first_rows([{"text": "ab"}], 4, False) == []
    assert first_rows(None, 4, False) == []


def test_what_it_needs_is_said_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows=0; at least one"):
        KLCallback(rows=0)
    trainer = trainer_of(tmp_path, KLCallback())
    trainer.processing_class = trainer.callback_handler.processing_class = None
    with pytest.raises(ConfigError, match="has no tokenizer; make it with processing_class"):
        trainer.train()
