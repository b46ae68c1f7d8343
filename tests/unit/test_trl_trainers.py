"""TRL's trainers for preferences, rewards and self-distillation take the callback as its SFTTrainer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import holdfast
from holdfast.importance import ImportancePrior
from holdfast.models import LoraOptions, add_lora, block_parameters
from holdfast.tasks import toy_tokenizer
from tiny_models import tiny_model

trl = pytest.importorskip("trl")
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
PAIRS = [{"prompt": f"copy {x}=", "chosen": x, "rejected": x[::-1]} for x in ("abc", "hfa", "dea", "gbc")]


def dpo(model: Any, folder: Path, callback: Any) -> Any:
    args = trl.DPOConfig(str(folder), per_device_train_batch_size=2, **COMMON)
    return trl.DPOTrainer(
        model,
        ref_model=tiny_model("llama"),  # a model that was made here can't be loaded again by its name
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=toy_tokenizer(),
        callbacks=[callback],
    )


def grpo(model: Any, folder: Path, callback: Any) -> Any:
    args = trl.GRPOConfig(
        str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, **COMMON
    )
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) + i for i, text in enumerate(completions)],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        processing_class=toy_tokenizer(),
        callbacks=[callback],
    )


def sdft_of(folder: Path) -> dict[str, Any]:
    """Self-distillation (Shenfeld et al. 2026): the model sees the answer, and teaches itself without."""
    from trl.experimental.sdft import SDFTConfig

    few = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 6}
    # the usual teacher, the base, is loaded again by its name
    args = SDFTConfig(str(folder), teacher_model_kind="live", distillation_topk=8, **few, **COMMON)
    rows = [{"prompt": row["prompt"], "privileged_context": row["chosen"]} for row in PAIRS]
    return {"args": args, "train_dataset": Dataset.from_list(rows)}


def sdft(model: Any, folder: Path, callback: Any) -> Any:
    from trl.experimental.sdft import SDFTTrainer

    return SDFTTrainer(model, processing_class=toy_tokenizer(), callbacks=[callback], **sdft_of(folder))


@pytest.mark.parametrize("make", [dpo, sdft, pytest.param(grpo, marks=pytest.mark.slow)])
def test_what_is_held_fully_stays_bit_identical_and_the_rest_learns(make: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    held = block_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in held.values()))
    ranks = {name: torch.arange(float(p.numel())).reshape(p.shape) for name, p in held.items()}
    before = {name: p.detach().clone() for name, p in held.items()}
    callback = holdfast.ProtectCallback(ImportancePrior(ranks), "gate", shape="top", fraction=0.5)
    make(model, tmp_path, callback).train()
    moved = {name: (p.detach() != before[name]).flatten() for name, p in held.items()}
    assert not any(bool(m[m.numel() // 2 :].any()) for m in moved.values()), "the upper half is held"
    assert any(bool(m[: m.numel() // 2].any()) for m in moved.values()), "the lower half is free"


def test_a_strategys_loss_and_hold_act_in_a_trainer_that_distils_itself(tmp_path: Path) -> None:
    from trl.experimental.sdft import SDFTTrainer

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    logged: dict[float, float] = {}
    for strength in (0.0, 5.0):
        model = add_lora(tiny_model("llama"), LoraOptions(r=2))
        learner = holdfast.Learner(model, toy_tokenizer(), {"name": "c-lora", "strength": strength})
        with learner, learner.task("may", rows, rows) as stage:
            trainer = stage.trainer(SDFTTrainer, **sdft_of(tmp_path / str(strength)))
            logged[strength] = trainer.train().training_loss
            assert stage.record.steps == 2
        assert learner.learned == ["may"]
    assert logged[5.0] > logged[0.0] + 1, "the penalty is in the loss"
    model = tiny_model("llama")
    model.requires_grad_(True)
    learner = holdfast.Learner(model, toy_tokenizer(), {"name": "mofo", "updated": 0.2})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with learner, learner.task("may", rows, rows) as stage:
        given = sdft_of(tmp_path / "mofo")
        given["args"].max_steps = 1
        stage.trainer(SDFTTrainer, **given).train()
    shares = [float((p.detach() != before[n]).double().mean()) for n, p in model.named_parameters()]
    assert 0 < max(shares) <= 0.25, "a fifth of each tensor has moved"
