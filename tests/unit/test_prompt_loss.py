"""The loss on prompts: the formula token by token, on both architectures, and where it enters training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.tasks import Encoded, collate, toy_tokenizer
from holdfast.training.loop import train
from holdfast.training.options import TrainingOptions
from holdfast.training.prompt_loss import PromptLoss
from tiny_models import tiny_model

TOKENIZER = toy_tokenizer()
ROWS = [Encoded([1, 5, 6, 7, 8], [9, 2]), Encoded([1, 5], [10, 11, 12, 2]), Encoded([1, 6, 9], [2])]


def surprise(logits_V: Tensor, target: int) -> float:
    """-log softmax, literally."""
    values = logits_V.tolist()
    return math.log(sum(math.exp(v) for v in values)) - values[target]


def by_hand(model: Any) -> float:
    """The mean over all prompt tokens of all rows, each row by itself, without padding."""
    found = []
    for row in ROWS:
        ids = row.prompt_ids
        if model.config.is_encoder_decoder:
            decoder = [model.config.decoder_start_token_id, *ids[:-1]]
            read, written = torch.tensor([[TOKENIZER.eos_token_id]]), torch.tensor([decoder])
            logits = model(input_ids=read, decoder_input_ids=written).logits[0]
            found += [surprise(logits[t], ids[t]) for t in range(len(ids))]
        else:
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            found += [surprise(logits[t - 1], ids[t]) for t in range(1, len(ids))]
    return sum(found) / len(found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_prompt_loss_is_the_mean_surprise_of_the_prompt_tokens(kind: str, side: Any) -> None:
    model = tiny_model(kind).double()
    t5 = model.config.is_encoder_decoder
    batch = collate(ROWS, TOKENIZER.pad_token_id, encoder_decoder=t5, side="right" if t5 else side)
    outputs = model(**batch)
    loss = PromptLoss(0.25, TOKENIZER.eos_token_id)(model, batch, outputs)
    assert loss.item() == pytest.approx(0.25 * by_hand(model), rel=1e-6)  # the loss itself is in float32


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("trainer", ["auto", "sft"])
def test_training_adds_the_weighted_prompt_loss_to_the_loss_on_answers(
    kind: str, trainer: Any, tmp_path: Path
) -> None:
    if kind == "t5" and trainer == "sft":
        pytest.skip("TRL trains causal models only")

    def first_loss(weight: float | None) -> float:
        model = tiny_model(kind)
        options = TrainingOptions(
            max_steps=1, batch_size=3, learning_rate=1e-9, log_steps=1, trainer=trainer, lm_weight=weight
        )
        record = train(model, ROWS, options, tokenizer=TOKENIZER, folder=tmp_path / f"{weight}", seed=0)
        assert record.lm_weight == (weight or 0.0)
        return record.loss[0][1]

    model = tiny_model(kind)
    assert first_loss(None) == first_loss(0.0)
    assert first_loss(0.5) - first_loss(0.0) == pytest.approx(0.5 * by_hand(model), rel=1e-3)


def test_accumulating_micro_batches_averages_their_prompt_losses(tmp_path: Path) -> None:
    model = tiny_model("llama")
    rows = [ROWS[0]] * 4

    def first_loss(size: int, accumulation: int) -> float:
        options = TrainingOptions(
            max_steps=1,
            batch_size=size,
            gradient_accumulation=accumulation,
            learning_rate=1e-9,
            log_steps=1,
            lm_weight=1.0,
        )
        folder = tmp_path / f"{size}"
        return train(model, rows, options, tokenizer=TOKENIZER, folder=folder, seed=0).loss[0][1]

    assert first_loss(4, 1) == pytest.approx(first_loss(2, 2), rel=1e-4)


def test_a_prompt_of_one_token_has_nothing_to_learn() -> None:
    model = tiny_model("llama")
    batch = collate([Encoded([1], [5, 2])], TOKENIZER.pad_token_id, encoder_decoder=False)
    assert PromptLoss(0.25, 2)(model, batch, model(**batch)).item() == 0.0


def test_missing_logits_and_masks_are_named() -> None:
    model = tiny_model("llama")
    batch = collate(ROWS, TOKENIZER.pad_token_id, encoder_decoder=False)
    loss = PromptLoss(0.25, 2)
    with pytest.raises(ConfigError, match="needs the logits of all positions"):
        loss(model, batch, model(input_ids=batch["input_ids"], logits_to_keep=2))
    outputs = model(**batch)
    del batch["attention_mask"]
    with pytest.raises(ConfigError, match="needs `attention_mask`"):
        loss(model, batch, outputs)
