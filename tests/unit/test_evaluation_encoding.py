"""A test is encoded once, however often it is asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import validate
from holdfast.evaluation.faithfulness import measure_faithfulness
from holdfast.models import block_parameters, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.tasks import Encoder, Template, build_stream, toy_suite, toy_tokenizer
from holdfast.tasks.task import Example, Task


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each prompt was encoded, by any encoder."""
    calls: Counter[Any] = Counter()
    original = Encoder.__call__

    def counting(self: Encoder, example: Example) -> Any:
        calls[example.prompt] += 1
        return original(self, example)

    monkeypatch.setattr(Encoder, "__call__", counting)
    return calls


def prompts(task: Task, part: str) -> set[Any]:
    return {example.prompt for example in getattr(task, part)}


@pytest.mark.parametrize("metric", ["exact_match", "options"])
def test_a_run_encodes_each_test_row_once_over_all_its_evaluations(
    metric: str, encoded: Counter[Any], tiny: Any, tmp_path: Path
) -> None:
    values = tiny(tmp_path / "r")
    values["tasks"] = {"source": "toy", "order": ["head", "copy"], "train_rows": 24, "test_rows": 6}
    if metric == "options":
        values["tasks"] |= {"metric": {"head": "options"}, "options": {"head": list("abcdefgh")}}
    values["training"]["max_steps"] = 1
    config = validate(RunConfig, values, source="test")
    run(config)  # tested three times: before training, and after each task
    for task in build_stream(config.tasks, config.seed):
        assert {encoded[p] for p in prompts(task, "test")} == {1}
        assert {encoded[p] for p in prompts(task, "train") - prompts(task, "test")} == {1}  # to be trained on


def test_faithfulness_encodes_each_test_row_once_over_all_its_points(encoded: Counter[Any]) -> None:
    (task,) = toy_suite(["head"], train_rows=8, test_rows=4)
    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    weights = block_parameters(model)
    measure_faithfulness(
        model,
        tokenizer,
        task,
        Encoder(tokenizer, Template(), encoder_decoder=False),
        importance={name: p.detach().abs() for name, p in weights.items()},
        parameters=weights,
        percent=(0.0, 1.0),
    )
    assert {encoded[p] for p in prompts(task, "test")} == {1}
