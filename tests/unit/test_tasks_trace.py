"""TRACE: its published layout is read with the benchmark's metrics, and these are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.config import validate
from holdfast.errors import DataError
from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task
from holdfast.evaluation.scores import choice, edit_similarity, sari, sources_of
from holdfast.models import tiny_llama
from holdfast.runner.config import RunConfig
from holdfast.runner.findings import check
from holdfast.tasks import Encoder, Example, Task, Template, toy_tokenizer
from holdfast.tasks.sources import build_stream
from holdfast.tasks.trace import METRICS, TraceSource
from tiny_runs import tiny_run

ORDER = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]


def write_trace(root: Path, names: list[str] = ORDER, rows: int = 3) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for part in ("train", "eval", "test"):
            data = [{"prompt": f"{part} {i} of it", "answer": "A"} for i in range(rows)]
            (root / name / f"{part}.json").write_text(json.dumps(data))
    return root


def source(root: Path, **values: Any) -> TraceSource:
    return validate(TraceSource, {"source": "trace", "path": str(root), **values}, "test")


def test_the_published_layout_is_a_stream_in_the_benchmarks_order_with_its_metrics(tmp_path: Path) -> None:
    stream = build_stream(source(write_trace(tmp_path)))
    assert stream.name == "TRACE"
    assert stream.names == ORDER == list(METRICS)
    assert {task.name: task.metric for task in stream} == METRICS
    assert [row.prompt for row in stream.tasks[3].train] == [f"train {i} of it" for i in range(3)]
    assert [row.prompt for row in stream.tasks[3].test] == [f"test {i} of it" for i in range(3)]
    validation = build_stream(source(tmp_path, test_split="validation", order=["py150"]))
    assert [row.prompt for row in validation.tasks[0].test] == [f"eval {i} of it" for i in range(3)]


def test_what_is_missing_or_malformed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has none of TRACE's tasks"):
        build_stream(source(tmp_path))
    root = write_trace(tmp_path, ["Py150", "FOMC"])
    with pytest.raises(
        DataError, match=r"lacks C-STANCE, MeetingBank, .*; name those to learn in tasks.order"
    ):
        build_stream(source(root))
    assert build_stream(source(root, order=["Py150"])).names == ["Py150"]
    (root / "FOMC" / "test.json").write_text(json.dumps([{"prompt": "x"}]))
    with pytest.raises(DataError, match=r"FOMC/test.json row 1: no column 'answer'"):
        build_stream(source(root, order=["FOMC"]))


def test_check_passes_on_the_layout(tmp_path: Path) -> None:
    tasks = {
        "source": "trace",
        "path": str(write_trace(tmp_path / "trace")),
        "order": ["MeetingBank", "Py150"],
    }
    values = tiny_run(tmp_path / "run", tasks=tasks)
    assert check(validate(RunConfig, values, source="test")).problems == []


# the metrics


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [("B", "B", 100), ("B. Because", "B\nSince", 100), ("A", "B", 0), ("Because", "B", 0), ("", "B", 0),
     (" b)", "B", 100)],
)  # fmt: skip
def test_choice_is_the_letter_in_front(answer: str, expected: str, score: float) -> None:
    assert choice(answer, [expected]) == score


def ratio_by_table(a: str, b: str) -> float:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return 200.0 * table[-1][-1] / (len(a) + len(b))


def test_edit_similarity_is_twice_the_common_subsequence_over_both_lengths() -> None:
    assert edit_similarity("abcd", ["bcde"]) == 75.0
    assert edit_similarity("x = 1\n", [" x = 1", "y"]) == 100.0
    assert (edit_similarity("", ["a"]), edit_similarity("", [""])) == (0.0, 100.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        a, b = ("".join("abc"[i] for i in torch.randint(3, (n,), generator=draw)) for n in (9, 70))
        assert edit_similarity(a, [b]) == pytest.approx(ratio_by_table(a, b))


def test_sari_rewards_what_was_kept_added_and_deleted() -> None:
    source, reference = "a b c d", "a b e"
    # 1-grams: kept a, b (precision and recall 1), added e (1), deleted c, d (1); likewise to 4-grams
    assert sari("a b e", [reference], source) == pytest.approx(100.0)
    # copied: of 4 kept 1-grams 2 are right, nothing is added (F1 of precision 1 and recall 0) or deleted
    one = (2 * 0.5 * 1.0 / 1.5 + 0.0 + 1.0) / 3
    two = (2 * (1 / 3) * 1.0 / (4 / 3) + 0.0 + 1.0) / 3  # ab of ab, bc, cd
    three = (0.0 + 0.0 + 1.0) / 3  # abc, bcd kept, none of them wanted: F1 of 0 and 1; abe is not added
    four = (0.0 + 1.0 + 1.0) / 3  # abcd kept, nothing to add
    assert sari(source, [reference], source) == pytest.approx(100 * (one + two + three + four) / 4)


def test_saris_source_is_the_prompt_without_its_instruction() -> None:
    prompts = ["Simplify.\nA long text. Simple:", "Simplify.\nOne more. Simple:"]
    assert sources_of(prompts) == ["A long text", "One more"]
    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    rows = [Example("do abc=", "ab"), Example("do efg=", "ef")]
    task = Task("simple", rows, rows, metric="sari")
    encoder = Encoder(tokenizer, Template(), encoder_decoder=False)
    result = evaluate_task(model, tokenizer, task, encoder, options=EvaluationOptions())
    for prediction, text, row in zip(result.predictions, ("abc", "efg"), rows, strict=True):
        assert prediction.score == pytest.approx(sari(prediction.generated, [row.completion], text))
