"""`holdfast ask` and `Learner.answer`: what a folder holds answers as it did when it was tested."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_learn_command import in_this_process, refused
from typer.testing import CliRunner

from holdfast import Learner
from holdfast.cli import app
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.predictions import read_predictions
from holdfast.tasks import as_questions, toy_tokenizer
from learning_data import SHORT, TOY, data_sets, rows_of, write_rows
from processes import holdfast
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `may` and `june` were learned, well enough to answer otherwise than the base."""
    folder = tmp_path_factory.mktemp("made")
    data_sets(folder, "may", "june")
    long = ("training.max_steps=30", "training.learning_rate=0.01", "template.max_prompt_tokens=64")
    for data in ("may", "june"):
        more = (*TOY, *SHORT, *long) if data == "may" else ()
        ended = holdfast("learn", f"{data}.jsonl", "--skills", "s", *more, cwd=folder)
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "there")


def answered(folder: Path, stage: str, task: str) -> list[Any]:
    return list(read_predictions(folder / "s" / "tasks" / stage, task))


def test_answers_are_those_of_the_evaluation_now_and_then(made: Path) -> None:
    for after, stage in ((None, "02-june"), (1, "01-may")):
        known = answered(made, stage, "may")
        with Learner.load(made / "s", after=after) as learner:
            limit = learner.testing.longest("may")
            got = learner.answer([row.prompt for row in known], max_new_tokens=limit)
        assert got == [row.generated for row in known]
    assert len(set(got)) > 1


def test_the_base_answers_as_before_the_first_task(made: Path) -> None:
    asked = [row["prompt"] for row in rows_of("may", 4)]
    with Learner.load(made / "s") as learner:
        now, base = learner.answer(asked), learner.answer(asked, base=True)
        assert learner.answer(asked) == now
    with Learner.load(made / "s", after=0) as fresh:
        assert fresh.answer(asked) == base != now


def test_a_question_is_a_text_a_chat_or_a_row_with_or_without_an_answer() -> None:
    turn = {"role": "user", "content": "x"}
    rows = ["x", {"prompt": "x"}, {"prompt": "x", "completion": "y"}, {"instruction": "x"}, {"text": "x"}]
    assert {row.prompt for row in as_questions(rows)} == {"x"}
    row = {"messages": [turn, {"role": "assistant", "content": "y"}]}
    chats = [[turn], {"prompt": [turn]}, {"messages": [turn]}, row, {"conversations": [turn]}]
    assert {str(row.prompt) for row in as_questions(chats)} == {str((turn,))}
    with pytest.raises(
        DataError, match=r"question 2: an empty question(.|\n)*question 3: .*no column 'prompt'"
    ):
        as_questions(["x", " ", {"question": "x"}])
    with pytest.raises(DataError, match="there are none"):
        as_questions([])


def test_a_strategy_that_must_be_told_the_task_says_which_there_are(made: Path) -> None:
    with Learner.load(made / "s") as learner:
        with pytest.raises(ConfigError, match="got the task 'july'; learned here: may, june"):
            learner.answer(["x"], task="july")
        learner.state.strategy.needs_task_identity = True  # type: ignore[misc]
        with pytest.raises(
            ConfigError, match=r"got no task; learned here: may, june\. 'attribution' must be told"
        ):
            learner.answer(["x"])
        assert learner.answer(["x"], task="may") == learner.answer(["x"], task="june")
    with pytest.raises(ConfigError, match="of one too"):
        Learner(tiny_model("llama"), toy_tokenizer()).answer("x")


def test_the_command_answers_arguments_lines_and_files_alike(there: Path) -> None:
    asked = [row["prompt"].strip() for row in rows_of("may", 3)]
    by_argument = in_this_process("ask", "s", *asked, cwd=there)
    assert by_argument.code == 0, by_argument.err
    said = by_argument.out.splitlines()
    assert len(said) == 3
    with contextlib.chdir(there):
        piped = CliRunner().invoke(app, ["ask", "s"], input="\n".join(asked) + "\n\n")
    assert piped.stdout.splitlines() == said
    write_rows(there / "q.jsonl", [{"prompt": question, "id": i} for i, question in enumerate(asked)])
    filed = in_this_process("ask", "s", "--data", "q.jsonl", "--out", "a/a.jsonl", "--base", cwd=there)
    assert filed.code == 0, filed.err
    rows = [json.loads(line) for line in (there / "a" / "a.jsonl").read_text().splitlines()]
    assert [row["generated"] for row in rows] == said
    assert [row["id"] for row in rows] == [0, 1, 2]
    write_rows(there / "named.jsonl", [{"question": question} for question in asked])
    named = ("ask", "s", "--data", "named.jsonl", "--out", "named", "--column", "prompt=question")
    assert in_this_process(*named, cwd=there).code == 0
    kept = [json.loads(line) for line in (there / "named").read_text().splitlines()]
    assert [(row["question"], row["generated"]) for row in kept] == list(zip(asked, said, strict=True))
    refused(in_this_process(*named[:-2], cwd=there), "named is there already")
    refused(
        in_this_process(*named[:-4], "--out", "b", cwd=there),
        "no column 'prompt'",
        "to learn, attribute and ask",
    )
    both = in_this_process("ask", "s", "--base", asked[0], cwd=there)
    assert both.out.splitlines() == [f"base: {rows[0]['generated_by_base']}", f"now:  {said[0]}"]
    then = in_this_process("ask", "s", "--after", "may", asked[0], cwd=there)
    assert then.code == 0, then.err
    refused(in_this_process("ask", "s", "--after", "july", "x", cwd=there), "learned: may, june")
    again = ("ask", "s", "--data", "q.jsonl", "--out", "a/a.jsonl")
    refused(in_this_process(*again, cwd=there), "a/a.jsonl is there already")
    refused(in_this_process("ask", "s", "--data", "q.jsonl", cwd=there), "--data FILE with --out")
    refused(in_this_process("ask", "s", "--data", "p.jsonl", "--out", "b", cwd=there), "q.jsonl")


def test_what_is_cut_of_a_question_on_the_command_line_is_told(there: Path) -> None:
    asked = in_this_process("ask", "s", "a" * 3000, "copy ab=", cwd=there)
    assert asked.code == 0, asked.err
    assert asked.err.count("1 of 1 questions are longer than template.max_prompt_tokens") == 1
    assert len(asked.out.splitlines()) == 2


def test_answers_of_a_killed_file_don_t_go_on_under_other_rows(there: Path) -> None:
    rows = [{"prompt": row["prompt"], "id": i} for i, row in enumerate(rows_of("may", 200))]
    write_rows(there / "q.jsonl", rows)
    command = ("ask", "s", "--data", "q.jsonl", "--out", "a.jsonl")
    killed = holdfast(*command, cwd=there, die=("holdfast.learner.learner.ask", 2))
    assert killed.code == -signal.SIGKILL, killed.err
    write_rows(there / "q.jsonl", [{**row, "id": row["id"] + 1000} for row in rows])
    ended = in_this_process(*command, cwd=there)
    assert ended.code == 0, ended.err
    ids = [json.loads(line)["id"] for line in (there / "a.jsonl").read_text().splitlines()]
    assert ids == list(range(1000, 1200))


def test_a_killed_file_goes_on_where_it_was(there: Path) -> None:
    write_rows(there / "q.jsonl", [{"prompt": row["prompt"]} for row in rows_of("may", 300)])
    command = ("ask", "s", "--data", "q.jsonl", "--out")
    whole = in_this_process(*command, "whole.jsonl", cwd=there)
    assert whole.code == 0, whole.err
    killed = holdfast(*command, "a.jsonl", cwd=there, die=("holdfast.learner.learner.ask", 2))
    assert killed.code == -signal.SIGKILL, killed.err
    (left,) = there.glob("a.jsonl.*.partial")
    assert 0 < len(left.read_text().splitlines()) < 300
    with left.open("a") as file:
        file.write('{"prompt": "half a')
    ended = holdfast(*command, "a.jsonl", cwd=there)
    assert ended.code == 0, ended.err
    assert "of 300 are answered already" in ended.err
    assert (there / "a.jsonl").read_bytes() == (there / "whole.jsonl").read_bytes()
    assert not list(there.glob("*.partial"))


def test_a_row_with_a_column_of_an_answers_name_is_told(there: Path) -> None:
    write_rows(there / "q.jsonl", [{"prompt": "ab"}, {"prompt": "bc", "generated": "mine"}])
    ended = in_this_process("ask", "s", "--data", "q.jsonl", "--out", "a.jsonl", cwd=there)
    refused(ended, "1 of 2 rows, first row 2, have 'generated' already")
    assert not list(there.glob("a.jsonl*"))


def test_a_missing_number_of_a_table_is_null_in_the_answers(there: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["ab", "bc"], "weight": [1.5, float("nan")]})
    rows.to_parquet(there / "q.parquet")
    ended = in_this_process("ask", "s", "--data", "q.parquet", "--out", "a.jsonl", cwd=there)
    assert ended.code == 0, ended.err
    lines = (there / "a.jsonl").read_text().splitlines()
    strict = [
        json.loads(line, parse_constant=lambda what: pytest.fail(f"{what} is no JSON")) for line in lines
    ]
    assert [row["weight"] for row in strict] == [1.5, None]
