"""Every result file has one record, which writes it and reads it back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from holdfast import records
from holdfast.errors import DataError
from holdfast.records import (
    AdapterRanks,
    Comparison,
    Environment,
    Faithfulness,
    HarnessAnswers,
    Prediction,
    PriorMeta,
    ProtectionSummary,
    Pruning,
    Record,
    RunMetrics,
    StageMetrics,
    TrainingLog,
    UnitScores,
)

# the least that a file of the first version holds
LEAST: dict[type[Record], dict[str, Any]] = {
    RunMetrics: {"label": "x", "strategy": "ewc", "tasks": ["a"], "matrix": [[None], [90.0]]},
    StageMetrics: {"stage": "a", "scores": {"a": 90.0}},
    HarnessAnswers: {"now": {"arc_easy": {"acc,none": 0.5}}},
    TrainingLog: {"loss": [[10, 0.5]]},
    ProtectionSummary: {"histogram": {"edges": [0.0, 1.0], "counts": [3]}, "held": 0.0},
    UnitScores: {"kind": "matrix", "names": ["w"], "scores": [1.0]},
    AdapterRanks: {"rank": 4, "frozen": 2},
    Pruning: {"pruned": 0.9, "energy_left": 0.5},
    Faithfulness: {"percent": [1.0], "curves": {"random": [50.0]}},
    PriorMeta: {"dtype": "float32", "elements": 3, "sha256": "0" * 64},
    Environment: {"python": "3.11"},
    Prediction: {"prompt": "a=", "expected": ["a"], "generated": "b", "score": 0.0},
    Comparison: {"grid": "g.yaml", "seeds": [0], "finished": True, "rows": []},
}
FILES = pytest.mark.parametrize("record", LEAST, ids=lambda record: record.__name__)


def test_every_file_has_a_case_here() -> None:
    parts = {  # stand inside other records
        *("Candidate", "Choices", "ChosenRow", "ComparedRow", "ComparedRun", "ComparisonCurve"),
        *("ComparisonRow", "Curve", "CurvePoint", "Difference", "FailedCell", "Histogram", "Spread"),
    }
    known = {n for n, c in vars(records).items() if isinstance(c, type) and issubclass(c, Record)}
    assert known - parts - {"Record"} == {record.__name__ for record in LEAST}


@FILES
def test_file_of_the_first_version_is_read_and_written_back_the_same(
    record: type[Record], tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text(json.dumps(LEAST[record]))
    old = record.read(tmp_path / "old.json")
    old.write(tmp_path / "new.json")
    written = json.loads((tmp_path / "new.json").read_text())
    assert {key: written[key] for key in LEAST[record]} == LEAST[record]
    assert record.read(tmp_path / "new.json") == old


@FILES
@pytest.mark.parametrize("text", ["[]", '"x"', "null", "1", "true"])
def test_json_that_is_no_object_is_an_error_that_names_file_and_command(
    text: str, record: type[Record], tmp_path: Path
) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataError, match=r"m\.json: expected a JSON object, got \w+\. It may be torn.*`hold"):
        record.read(tmp_path / "m.json")


@FILES
def test_field_of_another_type_is_named(record: type[Record], tmp_path: Path) -> None:
    for key in LEAST[record]:
        (tmp_path / "m.json").write_text(json.dumps({**LEAST[record], key: [[{"odd": object.__name__}], []]}))
        with pytest.raises(DataError, match=rf"m\.json: .*{key}"):
            record.read(tmp_path / "m.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"x": ' + b"1" * 5000 + b"}"]
)
def test_what_is_no_json_is_an_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(DataError, match=r"m\.json: not readable as JSON"):
        StageMetrics.read(tmp_path / "m.json")
    with pytest.raises(DataError, match=r"gone\.json: not readable as JSON .*No such file"):
        StageMetrics.read(tmp_path / "gone.json")


def test_score_that_is_not_finite_is_written_as_not_measured(tmp_path: Path) -> None:
    StageMetrics(stage="a", scores={"a": float("nan"), "b": float("inf"), "c": 1.5}).write(tmp_path / "m")
    assert json.loads((tmp_path / "m").read_text())["scores"] == {"a": None, "b": None, "c": 1.5}


def test_matrix_of_another_shape_can_be_neither_read_nor_written() -> None:
    with pytest.raises(ValueError, match=r"2 tasks needs 3 rows .* of 2 values, got 2 rows of 1 values"):
        RunMetrics(label="x", strategy="ewc", tasks=["a", "b"], matrix=[[None], [1.0]])


def test_mechanisms_own_figures_are_kept(tmp_path: Path) -> None:
    ProtectionSummary(held=0.1, learning_rate=1e-3).write(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["learning_rate"] == 1e-3


def test_priors_meta_is_what_was_recorded_and_no_default() -> None:
    meta = {"importance": "lrp", "absorbed": {"norm": 0.1}, "tasks": ["a"]}
    assert PriorMeta(**LEAST[PriorMeta], **meta).meta == meta


def test_chat_is_one_text_with_a_line_a_message() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    row = {**LEAST[Prediction], "prompt": chat}
    assert Prediction(**row).question == "system: Be brief.\nuser: hi"


@pytest.mark.parametrize("record", LEAST, ids=lambda record: record.__name__)
def test_a_problem_is_told_by_the_keys_of_the_file(record: type[Record]) -> None:
    for key in record.model_fields:
        for junk in (5, "x", [["x"]], {"a": {"b": "x"}}, {"a": 5}, None):
            try:
                record.of({key: junk}, "file.json")
            except DataError as error:
                for said in str(error).removeprefix("file.json: ").split("; "):
                    assert "[" not in said.partition(":")[0], said
                    assert not re.search(r"\.(str|int|float|bool|dict|list)\b", said.partition(":")[0]), said
