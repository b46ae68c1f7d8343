"""Task names are anyone's: a slash or a colon in one breaks no file name and is shown as it is."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import validate
from holdfast.evaluation.predictions import file_safe
from holdfast.report import write_report
from holdfast.report.read import RunRecord, read
from holdfast.runner import RunConfig, run
from holdfast.tasks import TaskStream, build_stream

ODD = ["a/b", "a:b", "a%2Fb", "a_b", "a\\b", "../a", "/a", "a?*", "a\nb", 'a"b', "a\0b", "é/ü", ".."]


@pytest.mark.parametrize("name", ODD)
def test_any_name_makes_one_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"01-{file_safe(name)}.jsonl"
    file.write_text("")
    assert list(tmp_path.iterdir()) == [file]


def test_different_names_make_different_files() -> None:
    assert all(file_safe(a) != file_safe(b) for a, b in combinations(ODD, 2))


@pytest.mark.parametrize("name", ["sst-2", "task1572_samsum_summary", "v1.5", "my task", "Prüfung"])
def test_ordinary_names_stay(name: str) -> None:
    assert file_safe(name) == name


def test_a_run_of_tasks_with_odd_names_works_and_is_reported_under_them(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ["a/b", "a:b"]
    toys: dict[str, Any] = {}

    def renamed(*arguments: Any) -> TaskStream:
        stream = build_stream(*arguments)
        toys.update(zip(odd, stream, strict=True))
        return TaskStream("odd", tuple(replace(task, name=name) for name, task in toys.items()))

    monkeypatch.setattr(import_module("holdfast.runner.loop"), "build_stream", renamed)
    values = tiny(tmp_path / "r")
    values["tasks"] = {"source": "toy", "order": ["head", "copy"], "train_rows": 16, "test_rows": 4}
    values["training"]["max_steps"] = 1
    config = validate(RunConfig, values, source="test")
    metrics = run(config)
    assert metrics["tasks"] == odd
    assert run(config) == metrics  # found again: nothing is done twice

    record = read(tmp_path / "r")
    assert isinstance(record, RunRecord)
    assert [stage.task for stage in record.stages] == odd
    for stage in record.stages:
        for name, task in toys.items():
            asked = [prediction.question for prediction in stage.predictions(name)]
            assert asked == [example.prompt for example in task.test]
    page = write_report([tmp_path / "r"], tmp_path / "page.html", None).read_text()
    assert "a/b" in page
    assert "a:b" in page
