"""Soft prompts in front of a frozen model: what it then sees, what is trained, and that it stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.errors import ConfigError
from holdfast.evaluation.answers import generate
from holdfast.models import LoraOptions, add_lora
from holdfast.strategies.prompts.soft import SUBMODULE, Prompted, learn, put_in_front
from holdfast.tasks.encode import Encoded
from prompt_cases import (
    BOTH,
    KINDS,
    TOKENIZER,
    batch_of,
    constant,
    context_of,
    fit,
    knowing,
    model_of,
    rows_of,
    stage_of,
    strategy_of,
    trace,
)


@pytest.mark.parametrize("kind", KINDS)
def test_prompted_model_is_the_model_on_prompts_and_embeddings(kind: str) -> None:
    model, prompt = model_of(kind), torch.randn(3, 16)
    batch = batch_of(kind, rows_of(kind)[:1])
    embeds = torch.cat([prompt[None], model.get_input_embeddings()(batch["input_ids"])], 1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    extra = {"labels": batch["labels"]} if kind == "t5" else {}
    expected = model(inputs_embeds=embeds, attention_mask=mask, **extra).logits
    seen = Prompted(model, constant(prompt))(**batch).logits
    assert torch.equal(seen, expected if kind == "t5" else expected[:, 3:])
    assert not torch.allclose(seen, model(**batch).logits, atol=1e-2), "the prompts matter"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(kind: str, side: str) -> None:
    view, rows = Prompted(model_of(kind), constant(torch.randn(3, 16))), rows_of(kind)
    together = batch_of(kind, rows, side=None if kind == "t5" else side)
    logits, widths = view(**together).logits, together["attention_mask"].sum(1)
    assert len(set(widths.tolist())) > 2
    for i, row in enumerate(rows):
        alone = view(**batch_of(kind, [row])).logits[0]
        if kind == "t5":
            mine = logits[i, : len(alone)]
        else:
            mine = logits[i, -len(alone) :] if side == "left" else logits[i, : len(alone)]
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_alone_and_in_a_padded_batch(kind: str, name: str) -> None:
    model = model_of(kind, noise=0.7 if kind == "t5" else 0.2)
    before, view = trace(model), knowing(name).route(model, "copy")
    alone, together = (
        generate(view, TOKENIZER, rows_of(kind), batch_size=size, max_new_tokens=6) for size in (1, 8)
    )
    assert alone == together
    assert len(set(alone)) > 1
    assert trace(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_generated_answer_is_the_greedy_one_of_the_prompted_model(kind: str) -> None:
    model = model_of(kind)
    view, rows = Prompted(model, constant(torch.randn(3, 16))), rows_of(kind)
    for row, answer in zip(
        rows, generate(view, TOKENIZER, rows, batch_size=8, max_new_tokens=4), strict=True
    ):
        ids, out = (
            torch.tensor([row.prompt_ids]),
            [TOKENIZER.pad_token_id] if kind == "t5" else list(row.prompt_ids),
        )
        for _ in range(4):
            if kind == "t5":
                logits = view(ids, torch.ones_like(ids), decoder_input_ids=torch.tensor([out])).logits
            else:
                logits = view(torch.tensor([out]), torch.ones(1, len(out), dtype=torch.long)).logits
            out.append(int(logits[0, -1].argmax()))
            if out[-1] == TOKENIZER.eos_token_id:
                break
        new = out[1:] if kind == "t5" else out[len(row.prompt_ids) :]
        assert TOKENIZER.decode(new, skip_special_tokens=True).strip() == answer


def test_labels_and_positional_inputs_are_taken_and_given_embeddings_left_alone() -> None:
    model, prompt = model_of("llama"), torch.randn(3, 16)
    batch = batch_of("llama", rows_of("llama"))
    expected = Prompted(model, constant(prompt))(**batch).logits
    embeds = model.get_input_embeddings()(batch["input_ids"])
    plain = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    handle = put_in_front(model, constant(prompt))
    outputs = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert torch.equal(outputs.logits, expected)
    shifted = F.cross_entropy(expected[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, shifted)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits, plain)
    few = model(**{k: v for k, v in batch.items() if k != "labels"}, logits_to_keep=4).logits
    torch.testing.assert_close(few, expected[:, -4:])
    handle.remove()
    assert not torch.allclose(model(batch["input_ids"], batch["attention_mask"]).logits, expected, atol=1e-2)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_alone_are_trained_and_the_model_is_left_without_a_trace(
    kind: str, name: str, tmp_path: Path
) -> None:
    model, strategy = model_of(kind), strategy_of(name)
    next(model.parameters()).requires_grad_(False)  # a flag of its own
    before, context = trace(model), context_of(model, tmp_path)
    assert strategy.route(model, "copy") is model, "there are no prompts yet"
    strategy.begin(context, stage_of(0))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith(SUBMODULE) for n in trained)
    start = {n: t.clone() for n, t in getattr(model, SUBMODULE).state_dict().items()}
    fit(strategy, kind, model, rows_of(kind), tmp_path)
    after = getattr(model, SUBMODULE).state_dict()
    assert all(not torch.equal(start[n], after[n]) for n in start)
    strategy.end(context, stage_of(0))
    assert trace(model) == before


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("name", BOTH)
def test_prompts_learn_an_easy_task(name: str, kind: str, tmp_path: Path) -> None:
    model, strategy = model_of(kind), strategy_of(name)
    rows = [Encoded(r.prompt_ids, TOKENIZER("e")["input_ids"]) for r in rows_of(kind)]
    assert set(generate(model, TOKENIZER, rows, batch_size=8, max_new_tokens=1)) != {"e"}
    context = context_of(model, tmp_path)
    strategy.begin(context, stage_of(2))
    losses = fit(strategy, kind, model, rows, tmp_path, max_steps=25, learning_rate=0.1, batch_size=8)
    strategy.end(context, stage_of(2))
    assert losses[-1] < 0.5 * losses[0]
    view = strategy.route(model, "head")
    assert set(generate(view, TOKENIZER, rows, batch_size=8, max_new_tokens=1)) == {"e"}


@pytest.mark.parametrize("name", BOTH)
def test_prompts_train_under_bf16_autocast(name: str, tmp_path: Path) -> None:
    model, strategy = model_of("llama"), strategy_of(name)
    strategy.begin(context_of(model, tmp_path), stage_of(0))
    losses = fit(
        strategy, "llama", model, rows_of("llama"), tmp_path, precision="bf16", max_steps=4, batch_size=8
    )
    strategy.end(context_of(model, tmp_path), stage_of(0))
    assert losses[-1] < losses[0]
    tensors, _ = strategy.state_dict()
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("name", BOTH)
def test_half_precision_model_takes_prompts(name: str, tmp_path: Path) -> None:
    model, strategy = model_of("llama").bfloat16(), strategy_of(name)
    strategy.begin(context_of(model, tmp_path), stage_of(0))
    fit(strategy, "llama", model, rows_of("llama"), tmp_path, max_steps=1)
    strategy.end(context_of(model, tmp_path), stage_of(0))
    answers = generate(
        strategy.route(model, "copy"), TOKENIZER, rows_of("llama"), batch_size=4, max_new_tokens=3
    )
    assert len(answers) == 8


@pytest.mark.parametrize("name", BOTH)
def test_sft_trainer_gives_the_same_losses_and_prompts(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    losses, states = [], []
    for trainer in ("auto", "sft"):
        model, strategy = model_of("llama"), strategy_of(name)
        context = context_of(model, tmp_path / trainer)
        strategy.begin(context, stage_of(0))
        options = {"trainer": trainer, "optimizer": "sgd", "learning_rate": 0.1}
        losses.append(fit(strategy, "llama", model, rows_of("llama"), tmp_path / trainer, **options))
        strategy.end(context, stage_of(0))
        states.append(strategy.state_dict()[0])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # four or five digits are logged
    for n, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][n], rtol=1e-4, atol=1e-5)


class NoEmbeddings(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


@pytest.mark.parametrize("name", BOTH)
def test_model_that_cannot_be_prompted_is_named_with_the_fix(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.lora: strategy '{name}'.*leave out model\.lora"):
        strategy_of(name).check(add_lora(model_of("llama"), LoraOptions(r=4)))
    with pytest.raises(ConfigError, match=r"input embeddings .* not a NoEmbeddings"):
        strategy_of(name).check(NoEmbeddings())
    for kind in KINDS:
        strategy_of(name).check(model_of(kind))


def test_handle_may_be_removed_twice() -> None:
    model = model_of("llama")
    prompts = nn.ParameterList([torch.zeros(1, 16)])
    handle = learn(model, prompts, lambda ids, asked: prompts[0].expand(len(ids), -1, -1))
    handle.remove()
    handle.remove()
    assert not hasattr(model, SUBMODULE)
