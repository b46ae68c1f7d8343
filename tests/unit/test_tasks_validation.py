"""Validation rows: training data that training leaves out, so that nothing is chosen on test rows."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from holdfast.config import validate
from holdfast.errors import DataError
from holdfast.runner import RunConfig
from holdfast.runner.findings import check
from holdfast.tasks import Task, TaskStream, build_stream
from holdfast.tasks.options import SourceOptions, left_out, subsample
from holdfast.tasks.sources import TasksOptions, inspect_stream
from holdfast.tasks.task import Example
from tiny_runs import tiny_run

ADAPTER: TypeAdapter = TypeAdapter(TasksOptions)


def options_of(**config: object) -> SourceOptions:
    return ADAPTER.validate_python({"test_split": "validation", **config})


def stream_of(**config: object) -> TaskStream:
    return build_stream(options_of(**config))


def prompts(rows: object) -> set[str]:
    return {str(row.prompt) for row in rows}  # type: ignore[attr-defined]


def sources(folder: Path) -> list[dict[str, object]]:
    """Every source, on a task of 30 training rows whose test file is broken: it must not be read."""
    rows = [{"prompt": f"p {i}", "completion": "x"} for i in range(30)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    jsonl, bench = folder / "jsonl" / "one", folder / "bench" / "group" / "one"
    for path in (jsonl, bench):
        path.mkdir(parents=True)
    (jsonl / "train.jsonl").write_text(text)
    (jsonl / "test.jsonl").write_text("broken")
    labelled = [{"sentence": f"p {i}", "label": "x"} for i in range(30)]
    (bench / "train.json").write_text(json.dumps(labelled))
    (bench / "test.json").write_text("broken")
    trace = folder / "trace" / "FOMC"
    trace.mkdir(parents=True)
    for part in ("train", "eval"):
        data = [{"prompt": f"{part} {i}", "answer": "A"} for i in range(30)]
        (trace / f"{part}.json").write_text(json.dumps(data))
    (trace / "test.json").write_text("broken")
    return [
        {"source": "jsonl", "path": str(folder / "jsonl")},
        {"source": "cl_benchmark", "path": str(folder / "bench")},
        {"source": "hub", "tasks": {"one": {"path": str(jsonl / "train.jsonl"), "test": "no_such_split"}}},
        {"source": "trace", "path": str(folder / "trace"), "order": ["FOMC"]},
        {"source": "toy", "order": ["copy"], "size": 4},
    ]


def test_every_source_tests_on_left_out_rows_and_reads_no_test_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    configs = sources(tmp_path)
    assert {c["source"] for c in configs} == {c.model_fields["source"].default for c in _all_sources()}
    for config in configs:
        (task,) = stream_of(**config, train_rows=20, test_rows=8).tasks
        assert (len(task.train), len(task.test)) == (20, 8)
        assert not prompts(task.train) & prompts(task.test)
        assert stream_of(**config, train_rows=20, test_rows=8).tasks[0] == task
        other = stream_of(**config, train_rows=20, test_rows=8, seed=1).tasks[0]
        assert prompts(other.test) != prompts(task.test)


def _all_sources() -> list[type[SourceOptions]]:
    return [cls for cls in SourceOptions.__subclasses__() if cls.__module__.startswith("holdfast.")]


def test_what_is_trained_on_does_not_depend_on_what_is_tested_on(tmp_path: Path) -> None:
    (jsonl, *_, toy) = sources(tmp_path)
    (tmp_path / "jsonl" / "one" / "test.jsonl").write_text('{"prompt": "t", "completion": "x"}\n')
    for config in (jsonl, toy):
        config |= {"train_rows": 12, "test_rows": 9}
        (validation,), (test,) = (stream_of(**config, test_split=s).tasks for s in ("validation", "test"))
        assert validation.train == test.train
        assert not prompts(validation.test) & prompts(test.test)


class _Made(SourceOptions):
    """A source of rows that a test gives."""

    rows: tuple[str, ...]

    def available(self, problems: object) -> list[str]:
        return ["made"]

    def read(self, name: str, problems: object, seed: int) -> Task:
        return Task(name, [Example(row, "x") for row in self.rows], [Example("test", "x")])


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, 25), min_size=1, max_size=40),
    train=st.none() | st.integers(1, 45),
    test=st.none() | st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_validation_and_training_rows_never_overlap(rows, train, test, seed):
    options = _Made(
        rows=tuple(map(str, rows)), train_rows=train, test_rows=test, test_split="validation", seed=seed
    )
    stream, problems = inspect_stream(options)
    (task,) = stream.tasks
    assert not prompts(task.train) & prompts(task.test)
    assert prompts(task.test) <= set(map(str, rows))
    assert bool(problems.found) == (len(task.test) < (test or 1))
    every = [Example(str(i), "x") for i in range(len(rows))]  # without repeated prompts: a partition
    parts = [*subsample(every, train, seed, "a"), *left_out(every, train, seed, "a")]
    assert sorted(parts, key=lambda row: int(row.prompt)) == every


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (
            {"train_rows": 25, "test_rows": 8},
            r"task 'one': test_split: validation needs 8 rows \(test_rows\) that training leaves out, but of "
            r"30 training rows 25 are trained on, and 5 with other prompts are left; "
            r"set tasks.train_rows to 22 or less",
        ),
        ({}, r"needs 1 rows that .* 30 are trained on, and 0 .* set tasks.train_rows to 29 or less"),
        ({"train_rows": 5, "test_rows": 40}, r"and 25 with other prompts are left; it is too small"),
    ],
)
def test_too_few_rows_are_a_clear_error_before_training(tmp_path, settings_, message):
    config = sources(tmp_path)[0] | settings_
    with pytest.raises(DataError, match=message):
        stream_of(**config)


def test_check_says_that_scores_are_of_validation_rows_and_the_config_keeps_it(tmp_path):
    values = tiny_run(tmp_path / "run")
    values["tasks"] = {**values["tasks"], "test_split": "validation"}
    config = validate(RunConfig, values, "test")
    assert config.model_dump(mode="json")["tasks"]["test_split"] == "validation"
    (remark,) = [r for r in check(config).remarks if "validation" in r]
    assert "validation rows, 8 a task" in remark
    values["tasks"]["test_split"] = "test"
    assert not [r for r in check(validate(RunConfig, values, "test")).remarks if "validation" in r]
