"""LFPT5: one prompt in front, its three losses written out, and who writes behind what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from contexts import context_of
from holdfast.models import digest, is_encoder_decoder
from holdfast.strategies.generation import whole_rows, writing_loss
from holdfast.tasks.task import Example
from holdfast.training.teacher import distillation
from prompt_cases import PAD, TOKENIZER, batch_of, model_of, stage_of, strategy_of, trace

END = TOKENIZER.eos_token_id
OLD = Example("copy abcd=", "abcd")


def second_task(kind: str, tmp_path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """In a second task, with one row written of the first and a prompt that has moved since."""
    strategy, model = strategy_of("lfpt5", tokens=3, **options), model_of(kind)
    strategy.begin(context_of(model, tmp_path), stage_of(0))
    strategy.end(context_of(model, tmp_path), stage_of(0))
    strategy.tasks.write = lambda *args: [("copy", OLD)]  # type: ignore[method-assign]
    context = context_of(model, tmp_path)
    strategy.begin(context, stage_of(1))
    examples = strategy.examples(context, stage_of(1))
    assert examples[-1] == OLD
    with torch.no_grad():
        strategy._new.rows.add_(torch.randn_like(strategy._new.rows))
    return strategy, model, batch_of(kind, context.encoder.many([examples[0], OLD]))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_loss_is_the_answers_the_whole_rows_and_the_kl_on_written_ones(kind: str, tmp_path: Path) -> None:
    strategy, model, batch = second_task(kind, tmp_path)
    outputs = model(**batch)
    loss = strategy.loss(model, batch, outputs, torch.tensor(1.0))
    whole = whole_rows(batch, is_encoder_decoder(model))[1]
    tokens = strategy._tokens.rows[[1, 0]][:, None]  # the new task's, that of the written row
    in_front = torch.cat([strategy._new.rows.expand(2, -1, -1), tokens], dim=1)
    expected = 1.0 + 0.25 * writing_loss(model, in_front, whole, PAD, END)
    with torch.no_grad():
        moved = strategy._new.rows.clone()
        strategy._new.rows.copy_(strategy.prompt)
        before = model(**batch).logits
        strategy._new.rows.copy_(moved)
    labels = batch["labels"]
    shift = 0 if kind == "t5" else 1  # a causal model's position i predicts token i + 1
    answer = labels[1, shift:] != -100
    end = outputs.logits.shape[1] - shift
    kl = distillation(outputs.logits[1, :end][answer], before[1, :end][answer], 1.0)
    assert float(kl.detach()) > 1e-4
    torch.testing.assert_close(loss, expected + 0.01 * kl)


def test_the_prompt_alone_is_trained_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    model = model_of("llama")
    before, strategy = trace(model), strategy_of("lfpt5", tokens=3)
    strategy.begin(context_of(model, tmp_path), stage_of(0))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"soft_prompts.0.rows", "soft_prompts.1.rows"}
    frozen = digest(model.model)
    strategy.end(context_of(model, tmp_path), stage_of(0))
    assert trace(model) == before
    assert digest(model.model) == frozen


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_rows_are_written_behind_prompt_and_token_and_answered_behind_the_prompt(
    kind: str, tmp_path: Path
) -> None:
    strategy, model = strategy_of("lfpt5", tokens=3), model_of(kind)
    strategy.begin(context_of(model, tmp_path), stage_of(0))
    strategy.end(context_of(model, tmp_path), stage_of(0))
    seen: list[Any] = []

    def write(context: Any, stage: Any, solver: Any, writer_of: Any, count: int) -> list[Any]:
        ids = torch.full((2, 4), 7)
        mask = torch.ones_like(ids)
        token = strategy.tasks.rows[0]
        seen.extend([solver.source(ids, mask.bool()), writer_of(token).source(ids, mask.bool())])
        assert len(model._forward_pre_hooks) == 0, "only the wrappers put anything in front"
        return []

    strategy.tasks.write = write  # type: ignore[method-assign]
    strategy.begin(context_of(model, tmp_path), stage_of(1))
    strategy.examples(context_of(model, tmp_path), stage_of(1))
    solving, writing = seen
    assert torch.equal(solving, strategy.prompt.expand(2, -1, -1))
    assert torch.equal(writing[:, :3], solving)
    assert torch.equal(writing[:, 3], strategy.tasks.rows[:1].expand(2, -1))
    assert len(model._forward_pre_hooks) == 1
