"""What ``holdfast learn`` can be told of its data: their columns, and how their answers are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.cli.learning import Metric
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.predictions import read_predictions
from holdfast.evaluation.scores import METRICS
from holdfast.learner.skills import Skills
from holdfast.progress import Progress
from holdfast.runner.learn import learn_data
from holdfast.tasks.rows import Columns
from learning_data import SHORT, TOY, rows_of, write_rows


def learn(data: Path, skills: Path, **more: Any) -> Skills:
    return learn_data(data, skills, assignments=[*TOY, *SHORT], progress=Progress(quiet=True), **more)


def test_every_metric_that_is_listed_can_be_given() -> None:
    assert {metric.value for metric in Metric} == set(METRICS)


def test_allowed_answers_beside_the_data_are_chosen_from(tmp_path: Path) -> None:
    rows = [{"prompt": f"head {i % 8}{i}: ", "completion": "abc"[i % 3]} for i in range(20)]
    data = write_rows(tmp_path / "may" / "train.jsonl", rows).parent
    give = "needs the allowed answers: put a labels.json with a list of them into a folder"
    with pytest.raises(DataError, match=give):
        learn(data, tmp_path / "s", metric="options")
    (data / "labels.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(DataError, match="the answer 'c' is none of its options"):
        learn(data, tmp_path / "s", metric="options")
    (data / "labels.json").write_text(json.dumps(["a", "b", "c"]))
    (skill,) = learn(data, tmp_path / "s", metric="options").skills
    assert skill.metric == "options"
    said = {answer.generated for answer in read_predictions(tmp_path / "s" / "tasks" / "01-may", "may")}
    assert said
    assert said <= {"a", "b", "c"}


def test_columns_of_other_names_can_be_said(tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in rows_of("may")]
    data, test = write_rows(tmp_path / "may.jsonl", rows[:-4]), write_rows(tmp_path / "t.jsonl", rows[-4:])
    with pytest.raises(DataError, match=r"(?s)no column 'prompt'.*`--column prompt=NAME --column compl"):
        learn(data, tmp_path / "s")
    columns = ["prompt=say {q}", "completion=a"]
    (skill,) = learn(data, tmp_path / "s", test=test, columns=columns).skills
    assert (skill.train_rows, skill.test_rows) == (36, 4)
    asked = [answer.prompt for answer in read_predictions(tmp_path / "s" / "tasks" / "01-may", "may")]
    assert asked == [f"say {row['q']}" for row in rows[-4:]]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["prompt"], "'prompt' must be KEY=COLUMN, such as prompt=question. Keys: prompt, completion"),
        (["prompt=a", "prompt=b"], "'prompt=b' is given twice"),
        (["promt=a"], "Did you mean 'prompt'"),
        (["messages=a", "prompt=b"], "give either `messages`, or `prompt` and `completion`"),
    ],
)
def test_columns_that_say_nothing_are_refused(said: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Columns.of(said)
    assert Columns.of(["prompt={a}=", "completion=x=y"]) == Columns(prompt="{a}=", completion="x=y")


def test_attribute_takes_the_columns_too(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "may.jsonl", [{"q": "a", "a": "b"}])
    arguments = [
        "attribute",
        "--model",
        str(tmp_path / "no"),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "p"),
    ]
    refused = CliRunner().invoke(app, arguments)
    assert "no column 'prompt'" in refused.stderr
    further = CliRunner().invoke(app, [*arguments, "--column", "prompt=q", "--column", "completion=a"])
    assert "no Hugging Face model" in further.stderr, "the rows are read"
