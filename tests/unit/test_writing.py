"""Rows that a model writes itself: how tokens are drawn, what is left out and counted, what decides a row."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.evaluation import writing
from holdfast.evaluation.answers import greedy
from holdfast.evaluation.writing import Written, choose, write_rows
from holdfast.models import tiny_llama
from holdfast.tasks import Encoded, Encoder, Example, Template, toy_suite, toy_tokenizer
from holdfast.tasks.memory import WritingOptions
from holdfast.tasks.opening import opening_of
from holdfast.training.loop import train
from holdfast.training.options import TrainingOptions
from kills import Killed, dying
from tiny_t5 import tiny_t5

TOKENIZER = toy_tokenizer()
KNOWN = [Example("copy ab=", "ab"), Example("copy cdc=", "cdc")]


def encoder_of(t5: bool = False, **template: Any) -> Encoder:
    template = {"prompt": "{prompt}{eos}"} if t5 else template
    return Encoder(TOKENIZER, Template(**template), encoder_decoder=t5)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


# drawing


@example([0.0, 0.0, 0.9405417331182555, 2.220446049250313e-16], 0.5, 3.0, 1.0)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=6),
    st.floats(0, 0.999),
    st.floats(0.2, 3),
    st.floats(0.05, 1),
)
def test_a_token_is_drawn_by_inverting_the_nucleus(
    logits: list[float], drawn: float, temperature: float, top_p: float
) -> None:
    scaled = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()
    ranked = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    nucleus: list[int] = []
    for i in ranked:
        nucleus.append(i)
        if sum(scaled[j] for j in nucleus) >= top_p:
            break
    target, total = drawn * sum(scaled[j] for j in nucleus), 0.0
    allowed = set()  # rounding may decide between two neighbours at a border
    for i in nucleus:
        if total - 1e-9 <= target <= total + scaled[i] + 1e-9:
            allowed.add(i)
        total += scaled[i]
    token = int(choose(torch.tensor([logits]).double(), torch.tensor([drawn]), temperature, top_p)[0])
    borders = {ranked[len(nucleus)]} if len(nucleus) < len(ranked) and abs(total - top_p) < 1e-9 else set()
    # nor does it matter which of two tokens as likely as each other, to the last bits, stands first
    allowed |= {j for j in ranked for i in allowed | borders if abs(scaled[i] - scaled[j]) < 1e-12}
    assert token in allowed | borders


def test_drawn_tokens_come_as_often_as_their_probability_says() -> None:
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    drawn = (torch.arange(20000) + 0.5) / 20000
    tokens = choose(probability.log().expand(20000, 4), drawn, 1.0, 1.0)
    assert (tokens.bincount(minlength=4) / 20000).tolist() == pytest.approx(probability.tolist(), abs=1e-4)
    nucleus = choose(probability.log().expand(20000, 4), drawn, 1.0, 0.75)
    assert (nucleus.bincount(minlength=4) / 20000).tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=1e-4)


@pytest.mark.parametrize("leading", [3, 8, 63, 64, 100])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.3, None), (0.95, None), (0.95, 5), (1.0, None), (1.0, 70)])
def test_to_sort_the_first_tokens_alone_draws_what_to_sort_them_all_does(
    leading: int, ties: bool, top_p: float, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits_BV, drawn_B = torch.randn(200, 64) * 3, torch.rand(200, dtype=torch.float64)
    logits_BV = logits_BV.round() if ties else logits_BV
    sorted_BV, order_BV = (logits_BV.double() / 0.7).softmax(-1).sort(descending=True, stable=True)
    total_BV = sorted_BV.cumsum(-1)
    last_B1 = (total_BV < top_p).sum(-1, keepdim=True).clamp(max=(top_k or 64) - 1).clamp(max=63)
    target_B1 = drawn_B[:, None] * total_BV.gather(-1, last_B1)
    place_B1 = (total_BV <= target_B1).sum(-1, keepdim=True).minimum(last_B1)
    monkeypatch.setattr(writing, "_LEADING", leading)
    assert torch.equal(choose(logits_BV, drawn_B, 0.7, top_p, top_k), order_BV.gather(-1, place_B1)[:, 0])


# filters, by a model that says what it is told to


class Scripted(nn.Module):
    """Writes given prompts in order, answers by a table, and is sure of an answer as a table says."""

    def __init__(self, prompts: list[str], answers: dict[str, str], log_prob: dict[str, float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.generation_config = SimpleNamespace(decoder_start_token_id=None)
        self.prompts, self.answers, self.log_prob = prompts, answers, log_prob

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        for row, ids in enumerate(input_ids.tolist()):
            text = TOKENIZER.decode(ids, skip_special_tokens=True)
            wanted = self.log_prob.get(text.partition("=")[0], -0.01)
            for t in range(len(ids) - 1):  # softmax of (x, 0, 0, ...) is exp(wanted) at the right token
                p = torch.tensor(wanted).exp()
                logits[row, t, ids[t + 1]] = (p * (len(TOKENIZER) - 1) / (1 - p)).log()
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: Tensor, logits_processor: Any = None, **rest: Any) -> Tensor:
        if logits_processor:
            new = [ids_of(self.prompts.pop(0)) for _ in input_ids]
        else:
            asked = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in input_ids]
            new = [ids_of(self.answers.get(text, "ok</s>")) for text in asked]
        width = max(len(ids) for ids in new)
        padded = [ids + [TOKENIZER.pad_token_id] * (width - len(ids)) for ids in new]
        return torch.cat([input_ids, torch.tensor(padded, dtype=torch.long)], dim=1)


def written(options: WritingOptions, batch_size: int = 3) -> Written:
    model = Scripted(
        ["a=", "b", "=", "ab=", "a=x", "c=", "d=", "e=", *(f"{c}=" for c in "fghijklmnopqrstuvwxyz012")],
        {"copy c=": "no end", "copy d=": "</s>"},
        {"copy e": -2.0},
    )
    encoder = encoder_of()
    return write_rows(
        model,
        encoder,
        opening_of(KNOWN, encoder, "copy"),
        options,
        count=8,
        seed="0",
        known=KNOWN,
        batch_size=batch_size,
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_what_is_left_out_is_counted_by_its_reason(batch_size: int) -> None:
    found = written(WritingOptions(unsure=-1.0), batch_size)
    assert [row.prompt for row in found.rows] == [f"copy {c}=" for c in "afghijkl"]
    assert [row.completion for row in found.rows] == ["ok"] * 8
    assert found.written == 32, "8, and as many more as may be: of the first 8 one was kept"
    assert found.unfinished == 2, "'b' has no closing, and the answer to c no end"
    assert found.empty == 2, "no text behind 'copy ', and an empty answer to d"
    assert found.copied == 1, "'copy ab=' is a row that was trained on"
    assert found.repeated == 1, "'a=' came twice"
    assert found.unsure == 1
    assert len(found.rows) + 7 + 17 == found.written, "17 more than wanted were written, and count as nothing"
    assert found.confidence == pytest.approx([-0.01] * 8, rel=1e-3)
    assert found.said() == (
        "8 of 32 rows kept (left out: 2 empty, 2 unfinished, 1 repeated, 1 copied, 1 unsure)"
    )


def test_an_answer_that_was_cut_is_kept_without_an_end_where_it_is_asked_for() -> None:
    found = written(WritingOptions(unsure=-1.0, cut="kept"))
    (row,) = [row for row in found.rows if not row.ended]
    assert (row.prompt, row.completion) == ("copy c=", "no end")
    assert (found.cut, found.unfinished) == (1, 1), "'b' has no closing all the same"
    assert found.said().startswith("8 of 32 rows kept, 1 of them cut (left out:")
    assert Example.of_record(json.loads(json.dumps(row.record()))) == row
    encoder = encoder_of()
    assert encoder(row).completion_ids == encoder(replace(row, ended=True)).completion_ids[:-1]


def test_half_a_letter_at_a_cut_is_left_off() -> None:
    model = Scripted(["a="], {"copy a=": "ok\N{REPLACEMENT CHARACTER}"}, {})
    encoder = encoder_of()
    options, opening = WritingOptions(cut="kept", tries=1), opening_of(KNOWN, encoder, "copy")
    with pytest.MonkeyPatch.context() as patch:  # no tokenizer of letters has half of one
        patch.setattr(Encoder, "answer_of", lambda self, ids: "ok\N{REPLACEMENT CHARACTER}")
        found = write_rows(model, encoder, opening, options, count=1, seed="0")
    assert [row.completion for row in found.rows] == ["ok"]


def test_without_a_threshold_no_row_is_unsure() -> None:
    found = written(WritingOptions())
    assert "copy e=" in [row.prompt for row in found.rows]
    assert found.unsure == 0


def test_a_model_that_writes_nothing_usable_stops_after_so_many_tries() -> None:
    encoder = encoder_of()
    model = Scripted(["b"] * 40, {}, {})
    found = write_rows(
        model, encoder, opening_of(KNOWN, encoder, "copy"), WritingOptions(tries=3), count=10, seed="0"
    )
    assert (found.written, found.unfinished, found.rows) == (30, 30, [])


def test_a_second_round_makes_up_for_what_the_first_left_out() -> None:
    """Half of the rows are unfinished: 16, and then 16 for the 8 that are missing."""
    encoder, rounds = encoder_of(), []

    class Counted(Scripted):
        def generate(self, input_ids: Tensor, logits_processor: Any = None, **rest: Any) -> Tensor:
            rounds.extend([len(input_ids)] if logits_processor else [])
            return super().generate(input_ids, logits_processor, **rest)

    model = Counted([text for c in "fghijklmnopqrstu" for text in ("b", f"{c}=")], {}, {})
    found = write_rows(
        model,
        encoder,
        opening_of(KNOWN, encoder, "copy"),
        WritingOptions(),
        count=16,
        seed="0",
        batch_size=99,
    )
    assert (len(found.rows), rounds) == (16, [16, 16])


def test_a_prompt_that_reaches_the_limit_is_whole_where_rows_are_cut_there() -> None:
    encoder = encoder_of(prompt="{bos}{prompt}=", max_prompt_tokens=7)
    rows = [Example("copy abcdef", "x"), Example("copy b", "x")]
    opening = opening_of(rows, encoder, "copy")
    assert opening.cut
    model = Scripted(["abcd"] * 8, {}, {})
    found = write_rows(model, encoder, opening, WritingOptions(), count=1, seed="0")
    assert [row.prompt for row in found.rows] == ["copy ab"]
    assert not opening_of(rows[1:] * 2, encoder, "copy").cut


def test_what_was_written_is_kept_as_text_and_counts(tmp_path: Path) -> None:
    written(WritingOptions(unsure=-1.0)).save(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "prompt": "copy a=",
        "completion": "ok",
        "references": [],
        "confidence": pytest.approx(-0.01, rel=1e-3),
    }
    assert json.loads((tmp_path / "memory.json").read_text()) == {
        "asked": 8,
        "written": 32,
        "kept": 8,
        "opening": "<s>copy ",
        "closing": "=",
        "empty": 2,
        "cut": 0,
        "unfinished": 2,
        "repeated": 1,
        "copied": 1,
        "unsure": 1,
    }


# real models


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that has learned one-letter answers, and a little of how their prompts look."""
    t5 = request.param == "t5"
    made = tiny_t5(TOKENIZER) if t5 else tiny_llama(TOKENIZER, hidden=32, layers=2)
    (task,) = toy_suite(["head"], 64, 1)
    options = TrainingOptions(max_steps=60, learning_rate=1e-2, lm_weight=1.0)
    folder = tmp_path_factory.mktemp("trained")
    train(made, encoder_of(t5).many(task.train), options, tokenizer=TOKENIZER, folder=folder, seed=0)
    return made.double().eval()


def rows_of(model: Any, batch_size: int, seed: str = "0", kept: Path | None = None) -> Written:
    encoder = encoder_of(model.config.is_encoder_decoder)
    (task,) = toy_suite(["head"], 64, 1)
    return write_rows(
        model,
        encoder,
        opening_of(task.train, encoder, "head"),
        WritingOptions(),
        count=6,
        seed=seed,
        known=task.train,
        batch_size=batch_size,
        kept=kept,
    )


def asked(patch: pytest.MonkeyPatch, die_at: int = 0) -> list[int]:
    """Count how often the model is asked for something, or die at one of these times."""
    calls = [0]
    for name in ("_draw", "greedy", "log_likelihoods"):
        patch.setattr(writing, name, dying(getattr(writing, name), die_at, calls))
    return calls


def test_killed_anywhere_the_same_rows_come_and_nothing_is_asked_twice(model: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls, whole = asked(patch), rows_of(model, 2, kept=tmp_path / "whole")
    assert whole.rows
    assert calls[0] > 8
    for die_at in (1, 2, 5, calls[0] // 2, calls[0]):
        kept = tmp_path / str(die_at)
        with pytest.MonkeyPatch.context() as patch:
            asked(patch, die_at)
            with pytest.raises(Killed):
                rows_of(model, 2, kept=kept)
        with pytest.MonkeyPatch.context() as patch:
            again, found = asked(patch), rows_of(model, 2, kept=kept)
        assert (found.rows, found.confidence, found.said()) == (whole.rows, whole.confidence, whole.said())
        # each time a few rows first, by which the model is known again
        assert again[0] == calls[0] - max(die_at - 2, 0)


def test_half_a_line_of_what_was_said_is_asked_again(model: Any, tmp_path: Path) -> None:
    whole = rows_of(model, 2, kept=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.MonkeyPatch.context() as patch:
        calls, found = asked(patch), rows_of(model, 2, kept=tmp_path)
    assert (found.rows, calls) == (whole.rows, [2]), "one more to know the model again"


@pytest.mark.parametrize("what", ["seed", "batch_size", "weights"])
def test_what_was_said_under_other_conditions_is_not_taken(what: str, model: Any, tmp_path: Path) -> None:
    rows_of(model, 2, kept=tmp_path)
    other = copy.deepcopy(model)
    if what == "weights":
        next(other.parameters()).data.mul_(1.001)
    with pytest.MonkeyPatch.context() as patch:
        calls = asked(patch)
        rows_of(other, 3 if what == "batch_size" else 2, "1" if what == "seed" else "0", kept=tmp_path)
    assert calls[0] > 4
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_depend_on_the_seed_and_not_on_the_batch_size(model: Any) -> None:
    found = rows_of(model, 64)
    assert found.rows, "something is compared"
    for size in (1, 5):
        again = rows_of(model, size)
        assert again.rows == found.rows
        assert again.said() == found.said()
    assert rows_of(model, 64, "1").rows != found.rows


def test_a_written_row_is_answered_as_the_model_answers_its_prompt(model: Any) -> None:
    t5 = model.config.is_encoder_decoder
    encoder = encoder_of(t5)
    for row in rows_of(model, 4).rows:
        asked = Encoded(encoder(row).prompt_ids, [])
        (ids,) = greedy(model, TOKENIZER, [asked], batch_size=1, max_new_tokens=129)
        assert encoder.answer_of(ids) == row.completion
