"""Rows of running text: read from where people have them, learned whole, written by the model, and scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from holdfast import Learner
from holdfast.config import validate
from holdfast.errors import DataError
from holdfast.evaluation.audit import audit
from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task
from holdfast.evaluation.writing import write_rows
from holdfast.models import load_model
from holdfast.progress import Progress
from holdfast.runner import RunConfig, run
from holdfast.runner.learn import learn_data
from holdfast.tasks import Encoder, Example, Task, Template, as_examples, toy_tokenizer
from holdfast.tasks.load import load_task
from holdfast.tasks.memory import WritingOptions
from holdfast.tasks.opening import opening_of, running
from holdfast.tasks.rows import Columns
from learning_data import SHORT, TOY, rows_of
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
TEXTS = ["abc def", "hgf", "cab dab", "fed gab ab", "bad cab"]


def encoder_of(kind: str = "llama", **template: Any) -> Encoder:
    return Encoder(TOKENIZER, Template(**template), encoder_decoder=kind == "t5")


def test_a_text_file_is_read_by_paragraphs_and_a_column_by_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nline\n\n\ntwo\u2028still two\n", encoding="utf-8")
    assert load_task(tmp_path / "a.txt").train == [
        Example.text("one\nline"),
        Example.text("two\u2028still two"),
    ]
    (tmp_path / "b.jsonl").write_text('{"text": "one", "id": 7}\n')
    task = load_task(tmp_path / "b.jsonl")
    assert (task.train, task.read_as) == ([Example.text("one")], "running text")
    assert as_examples([{"body": "x", "label": 1}], Columns(text="body")) == [Example.text("x")]


def test_a_text_beside_a_label_is_no_running_text() -> None:
    with pytest.raises(DataError, match="no column 'prompt'; columns of this row: text, label"):
        as_examples([{"text": "x", "label": "y"}])


def test_a_text_is_learned_whole_behind_the_begin_token_and_ended_unless_cut() -> None:
    row = encoder_of(prompt="{bos}Q: {prompt}\nA: ")(Example.text("abc"))
    assert row.prompt_ids == [TOKENIZER.bos_token_id]
    assert TOKENIZER.decode(row.completion_ids) == "abc</s>"
    cut = encoder_of(max_prompt_tokens=2, max_completion_tokens=2)(Example.text("abcdefg"))
    assert (TOKENIZER.decode(cut.completion_ids), cut.completion_cut) == ("abcd", 3)


def test_a_text_that_was_cut_has_no_end() -> None:
    encoder = encoder_of("llama")
    whole, cut = (encoder(Example.text("ab", ended=ended)) for ended in (True, False))
    assert cut.completion_ids == whole.completion_ids[:-1]
    found = Example.of_record(json.loads(json.dumps(Example.text("ab", ended=False).record())))
    assert not found.ended


def test_texts_without_an_end_are_kept_where_it_is_asked_for() -> None:
    encoder, model = encoder_of(max_prompt_tokens=3, max_completion_tokens=3), tiny_model("llama")
    options = WritingOptions(top_p=1.0, cut="kept", tries=1)
    found = write_rows(model, encoder, running(encoder), options, count=8, seed="0")
    assert found.unfinished == 0
    assert 0 < found.cut == sum(not row.ended for row in found.rows)


def test_a_record_brings_the_text_back_as_such() -> None:
    assert Example.of_record(json.loads(json.dumps(Example.text("a").record()))) == Example.text("a")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_score_is_a_hundred_by_the_perplexity_of_all_tokens(kind: str) -> None:
    model, encoder = tiny_model(kind).eval(), encoder_of(kind)
    rows = [Example.text(text) for text in TEXTS]
    found = evaluate_task(
        model, TOKENIZER, Task("t", (), rows, "perplexity"), encoder, options=EvaluationOptions(batch_size=2)
    )
    nll, count = 0.0, 0
    for row in encoder.many(rows):
        labels = torch.tensor([row.completion_ids])
        if kind == "t5":
            logits = model(input_ids=torch.tensor([row.prompt_ids]), labels=labels).logits
        else:
            logits = model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[:, :-1]
        nll += float(F.cross_entropy(logits[0].detach().double(), labels[0], reduction="sum"))
        count += labels.numel()
    assert found.score == pytest.approx(100 / math.exp(nll / count), rel=1e-5)
    assert found.predictions[0].generated.startswith("perplexity ")


def test_another_metric_is_refused_before_training() -> None:
    task = Task("notes", [Example.text("ab")], [Example.text("ba")], "exact_match")
    problems = audit(task, encoder_of(), tiny_model("llama"), EvaluationOptions()).problems
    assert problems == [
        "notes: rows of running text have no answer to generate; their metric is `perplexity`, "
        "not `exact_match`."
    ]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_model_writes_running_text_up_to_its_end_token(kind: str) -> None:
    encoder, model = encoder_of(kind), tiny_model(kind)
    assert opening_of([Example.text("ab"), Example.text("ba")], encoder, "t") == running(encoder)
    found = write_rows(model, encoder, running(encoder), WritingOptions(top_p=1.0), count=4, seed="0")
    assert found.rows
    assert all(row.raw and row.completion.strip() for row in found.rows)
    left_out = found.empty + found.unfinished + found.repeated + found.copied
    assert found.written >= len(found.rows) + left_out
    known = found.rows[:1]
    again = write_rows(
        model, encoder, running(encoder), WritingOptions(top_p=1.0), count=4, seed="0", known=known
    )
    assert again.copied == 1
    assert known[0] not in again.rows


def test_a_model_gets_better_at_text_and_keeps_it_through_learn_run_and_a_script(tmp_path: Path) -> None:
    data = tmp_path / "notes.txt"
    data.write_text("\n\n".join(row["completion"] for row in rows_of("may", 30)), encoding="utf-8")
    known = learn_data(data, tmp_path / "skills", assignments=[*TOY, *SHORT], progress=Progress(quiet=True))
    (skill,) = known.skills
    assert (skill.metric, skill.drift) == ("perplexity", None)
    assert skill.then is not None
    values = tiny_run(tmp_path / "run")
    folder = tmp_path / "tasks" / "notes"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        rows = [{"text": text} for text in TEXTS * 4]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["tasks"] = {"source": "jsonl", "path": str(folder.parent)}
    matrix = run(validate(RunConfig, values, source="test"))["matrix"]
    assert matrix[1][0] > matrix[0][0], "perplexity has fallen"
    model, tokenizer = load_model(validate(RunConfig, values, source="test").model, 0, toy_tokenizer)
    learner = Learner(model, tokenizer, "sequential", training={"max_steps": 2})
    with learner.task("notes", train=[{"text": t} for t in TEXTS], test=[{"text": "abc"}]) as stage:
        stage.train()
    assert learner.state.tests[0].metric == "perplexity"
