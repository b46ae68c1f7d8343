"""Generated answers don't depend on how they are batched, and options are ranked by their likelihood."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.evaluation import answers
from holdfast.evaluation.answers import generate, log_likelihoods, rank_options
from holdfast.evaluation.evaluate import EvaluationOptions, encode_task, evaluate_task
from holdfast.models import tiny_llama
from holdfast.tasks import Encoded, Encoder, Example, Task, Template, toy_tokenizer
from tiny_t5 import tiny_t5

PROMPTS = ["copy abc=", "flip abcdefgh=", "h=", "sort bdca=", "next aa=", "find ahbgcfb=", "a="]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return toy_tokenizer()


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    made = tiny_llama(tokenizer, hidden=32, layers=2) if request.param == "llama" else tiny_t5(tokenizer)
    with torch.no_grad():  # wide logits: no two tokens so close that rounding could choose between them
        for p in made.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return made.double().eval()


@pytest.fixture
def encoder(model: Any, tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, Template(), encoder_decoder=model.config.is_encoder_decoder)


def rows_of(encoder: Encoder) -> list[Encoded]:
    return encoder.many([Example(prompt, "x") for prompt in PROMPTS])


def greedy_by_hand(model: Any, tokenizer: Any, row: Encoded, budget: int) -> str:
    """One token at a time, no batch, no padding, no cache."""
    prompt, answer = torch.tensor([row.prompt_ids]), []
    for _ in range(budget):
        if model.config.is_encoder_decoder:
            decoder = torch.tensor([[model.config.decoder_start_token_id, *answer]])
            logits = model(input_ids=prompt, decoder_input_ids=decoder, use_cache=False).logits
        else:
            ids = torch.cat([prompt, torch.tensor([answer], dtype=torch.long)], dim=1)
            logits = model(input_ids=ids, use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@torch.no_grad()
def test_answers_equal_those_written_token_by_token(
    model: Any, tokenizer: Any, encoder: Encoder, batch_size: int
) -> None:
    rows = rows_of(encoder)
    expected = [greedy_by_hand(model, tokenizer, row, 6) for row in rows]
    assert len(set(expected)) > 2, "all answers alike: this test would show nothing"
    assert generate(model, tokenizer, rows, batch_size=batch_size, max_new_tokens=6) == expected


def test_generation_settings_of_the_model_are_put_aside(model: Any, tokenizer: Any, encoder: Encoder) -> None:
    rows = rows_of(encoder)
    before = generate(model, tokenizer, rows, batch_size=4, max_new_tokens=6)
    old = model.generation_config
    try:
        model.generation_config = type(old)(do_sample=True, temperature=5.0, top_k=7, repetition_penalty=3.0)
        assert generate(model, tokenizer, rows, batch_size=4, max_new_tokens=6) == before
    finally:
        model.generation_config = old


def test_progress_ends_at_the_number_of_rows(model: Any, tokenizer: Any, encoder: Encoder) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        model,
        tokenizer,
        rows_of(encoder),
        batch_size=3,
        max_new_tokens=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 7), (6, 7), (7, 7)]


def log_likelihood_by_hand(model: Any, row: Encoded, answer: list[int]) -> float:
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
        logits = model(input_ids=torch.tensor([row.prompt_ids]), decoder_input_ids=decoder).logits[0]
    else:
        ids = torch.tensor([[*row.prompt_ids, *answer]])
        logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
    return float(sum(logits.log_softmax(-1)[t, token] for t, token in enumerate(answer)))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@torch.no_grad()
def test_ranked_option_has_the_highest_log_likelihood(
    model: Any, tokenizer: Any, encoder: Encoder, batch_size: int
) -> None:
    rows = rows_of(encoder)
    texts = ["a", "bc", "yes", "no", "h"]
    options = [(text, encoder(Example("?", text)).completion_ids) for text in texts]
    expected = []
    for row in rows:
        scores = [log_likelihood_by_hand(model, row, ids) for _, ids in options]
        expected.append(texts[scores.index(max(scores))])
    assert rank_options(model, tokenizer, rows, options, batch_size=batch_size) == expected


def test_answer_budget_has_room_for_every_answer_that_counts_as_right(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, Template(), encoder_decoder=False)
    test = [Example("c", "a" * 7, ("a", "a" * 50))]
    task = Task("t", [Example("a", "abc"), Example("b", "a")], test)
    assert (
        encode_task(task, encoder, EvaluationOptions()).max_new_tokens == 50 + 1 + 2
    )  # and end token, two more
    assert encode_task(task, encoder, EvaluationOptions(max_new_tokens=9)).max_new_tokens == 9


def test_prediction_rows_say_prompt_expected_generated_and_score(
    model: Any, tokenizer: Any, encoder: Encoder
) -> None:
    examples = [Example("copy ab=", "ab"), Example("copy ba=", "ba", ("ba", "BA"))]
    task = Task("copy", examples, examples, metric="options", options=("ab", "ba"))
    result = evaluate_task(model, tokenizer, task, encoder, options=EvaluationOptions(batch_size=4))
    assert [p.prompt for p in result.predictions] == ["copy ab=", "copy ba="]
    assert [p.expected for p in result.predictions] == [["ab"], ["ba", "BA"]]
    assert {p.generated for p in result.predictions} <= {"ab", "ba"}
    assert result.score == sum(p.score for p in result.predictions) / 2
    for p in result.predictions:
        assert p.score == 100.0 * (p.generated == p.expected[0])


def test_lora_model_answers_without_its_own_generation_settings(tokenizer: Any) -> None:
    from holdfast.models import LoraOptions, add_lora

    base = tiny_llama(tokenizer, hidden=32, layers=1)
    rows = rows_of(Encoder(tokenizer, Template(), encoder_decoder=False))
    expected = generate(base, tokenizer, rows, batch_size=4, max_new_tokens=6)
    base.generation_config.repetition_penalty = 3.0
    lora = add_lora(base, LoraOptions(r=2))  # at first the identity
    assert generate(lora, tokenizer, rows, batch_size=4, max_new_tokens=6) == expected
    assert base.generation_config.repetition_penalty == 3.0


def test_likelihoods_are_the_same_where_their_logits_must_be_taken_in_parts(
    model: Any, tokenizer: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encoder.many([Example(prompt, "ab" * (1 + i % 3)) for i, prompt in enumerate(PROMPTS)])
    whole = log_likelihoods(model, tokenizer, rows)
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda module, args, out: sizes.append(out.logits.numel()))
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    monkeypatch.setattr(answers, "_CELLS", 2 * longest * len(tokenizer))
    torch.testing.assert_close(log_likelihoods(model, tokenizer, rows), whole)
    hook.remove()
    assert len(sizes) == 4
    assert max(sizes) <= 2 * longest * model.config.vocab_size
