"""KPIG: information gain by hand, the draw of rows by it, what is masked, and the divergence."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from contexts import context_of
from holdfast.strategies.kpig import chosen, divergence
from prompt_cases import TOKENIZER, batch_of, model_of, rows_of, stage_of, strategy_of

UNKNOWN = TOKENIZER.unk_token_id if TOKENIZER.unk_token_id is not None else TOKENIZER.pad_token_id
MEMORY = {"memory": {"count": 3}}


def second_task(kind: str, tmp_path: Path, **options: Any) -> tuple[Any, Any, Any]:
    strategy, model = strategy_of("kpig", **MEMORY, **options), model_of(kind)
    context = context_of(model, tmp_path)
    strategy.begin(context, stage_of(0))
    strategy.examples(context, stage_of(0))
    strategy.end(context, stage_of(0))
    strategy.begin(context, stage_of(1))
    return strategy, model, context


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gain_is_the_answers_log_probability_with_less_that_without_its_instruction(
    kind: str, tmp_path: Path
) -> None:
    strategy, model, context = second_task(kind, tmp_path)
    strategy.examples(context, stage_of(1))
    rows = strategy.memory.examples
    gains = strategy._gains(context, rows)
    for row, gain in zip(rows, gains, strict=True):
        encoded = context.encoder(row)
        start = len(context.encoder.frame(row.prompt)[0])
        length = len(TOKENIZER.encode("copy ", add_special_tokens=False))
        assert strategy.lengths["copy"] == length
        masked = list(encoded.prompt_ids)
        masked[start : start + length] = [UNKNOWN] * length
        sure = []
        for prompt in (encoded.prompt_ids, masked):
            ids = torch.tensor([prompt])
            answer = encoded.completion_ids
            with torch.no_grad():
                if kind == "t5":
                    said = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
                    logits = model(input_ids=ids, decoder_input_ids=said).logits[0]
                else:
                    whole = torch.tensor([prompt + answer])
                    logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
            sure.append(sum(float(logits[t].log_softmax(-1)[a]) for t, a in enumerate(answer)) / len(answer))
        assert gain == pytest.approx(sure[0] - sure[1], abs=1e-4)


def test_rows_are_drawn_by_how_little_their_instruction_matters() -> None:
    gains = [0.0, 1.0, 5.0]
    drawn = Counter(chosen(gains, 6000, 1.0, "a"))
    total = sum(math.exp(-gain) for gain in gains)
    for i, gain in enumerate(gains):
        assert drawn[i] / 6000 == pytest.approx(math.exp(-gain) / total, abs=0.02)
    assert chosen(gains, 9, 1.0, "a") == chosen(gains, 9, 1.0, "a")
    assert set(chosen(gains, 50, 0.01, "a")) == {0}


def test_later_stages_replay_the_stated_share_chosen_anew_by_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, _, context = second_task("llama", tmp_path, ratio=0.5, temperature=0.01)
    monkeypatch.setattr(strategy, "_gains", lambda context, rows: [5.0, 0.0, 5.0])
    rows = strategy.examples(context, stage_of(1))
    least = strategy.memory.examples[1]
    assert (len(rows), rows.count(least)) == (16, 8), "half are old, and all of these the one of least gain"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_loss_pushes_answers_with_and_without_the_key_part_apart(kind: str, tmp_path: Path) -> None:
    strategy, model, context = second_task(kind, tmp_path, weight=0.5)
    strategy.examples(context, stage_of(1))
    batch = batch_of(kind, context.encoder.many(stage_of(1).tasks[0].train[:3]))
    masked = strategy.masked(batch)
    changed = (masked != batch["input_ids"]).sum(1)
    assert changed.tolist() == [strategy.lengths["flip"]] * 3
    assert bool((masked[masked != batch["input_ids"]] == UNKNOWN).all())
    outputs = model(**batch)
    less = model(**{**batch, "input_ids": masked}).logits
    whole, labels = outputs.logits, batch["labels"]
    if kind != "t5":
        whole, less, labels = whole[:, :-1], less[:, :-1], labels[:, 1:]
    p, q = (x[labels != -100].softmax(-1) for x in (whole, less))
    m = (p + q) / 2
    jsd = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
    loss = strategy.loss(model, batch, outputs, torch.tensor(1.0))
    torch.testing.assert_close(loss, 1.0 - 0.5 * jsd, rtol=1e-4, atol=1e-5)


def test_divergence_is_bounded_by_ln_2() -> None:
    sure, other = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    assert float(divergence(sure, other)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(divergence(sure, sure)) == pytest.approx(0.0, abs=1e-6)
    assert len(rows_of("llama")) == 8
