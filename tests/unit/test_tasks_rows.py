"""Rows to examples: every form that is accepted, and the message for every form that isn't."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from holdfast.errors import DataError
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import Columns, as_examples, as_questions, to_example
from holdfast.tasks.task import Example

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def test_the_standard_row():
    rows = as_examples([{"prompt": "a", "completion": "b", "references": ["b", "c"], "id": 7}])
    assert rows == [Example("a", "b", ("b", "c"))]
    assert rows[0].answers == ("b", "c")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("may.jsonl", r"str \('may.jsonl'\); a file is read by holdfast.tasks.load_task\(path\).train"),
        (Path("may.jsonl"), r"PosixPath .*a file is read by"),
        (
            pd.DataFrame([{"prompt": "a", "completion": "b"}]),
            r"DataFrame; a table gives its rows by to_dict\('records'\)",
        ),
        (
            {"train": [{"prompt": "a", "completion": "b"}]},
            r"dict; of several splits give one, such as data\['train'\]",
        ),
    ],
    ids=["name", "path", "frame", "splits"],
)
def test_what_is_no_collection_of_rows_is_told_once_and_as_a_whole(rows, said):
    with pytest.raises(DataError, match=r"^data: rows are needed, such as a list of them, got " + said):
        as_examples(rows)


def test_a_single_question_is_not_read_character_by_character():
    with pytest.raises(
        DataError, match=r"^questions: .* \('What is due\?'\); a single question goes into a l"
    ):
        as_questions("What is due?")


@pytest.mark.parametrize("references", [None, [], "", " ", [""], [" ", ""], "absent"])
def test_without_references_the_completion_alone_is_right(references):
    row = {"prompt": "a", "completion": "b"} | ({} if references == "absent" else {"references": references})
    assert as_examples([row])[0].answers == ("b",)


def test_numbers_are_right_answers_as_they_are_completions():
    for references in ([1, 2, True], 1):
        row = as_examples([{"prompt": "a", "completion": 1, "references": references}])[0]
        assert row.answers == (("1", "2", "true") if references != 1 else ("1",))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "ho"},
    ],
)
def test_chat_rows_in_each_form_of_trl_give_the_same_example(row):
    assert as_examples([row]) == [Example((USER,), "ho")]


def test_other_columns_and_texts_of_several_columns():
    columns = Columns(prompt="{premise} / {hypothesis}", completion="label", references="gold")
    rows = as_examples(
        [{"premise": "p {x}", "hypothesis": 3, "label": 1, "gold": "one", "unused": 0.5}], columns
    )
    assert rows == [Example("p {x} / 3", "1", ("one",))]


@settings(deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text())
def test_any_text_survives_as_it_is(completion, prompt):
    assert as_examples([{"prompt": prompt, "completion": completion}]) == [Example(prompt, completion)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], r"must be an object such as .* got list|got a list"),
        (
            {"question": "a", "completion": "b"},
            "no column 'prompt'; columns of this row: question, completion",
        ),
        (
            {"prompt": "a", "answer": "b"},
            "written as prompt and answer, and the rows before it as prompt and completion: a file",
        ),
        ({"messages": []}, "written as chat messages, and the rows before it as prompt and completion"),
        ({"prompt": "a", "completion": None}, r"'completion' must be a text, got nothing \(null\)"),
        ({"prompt": 0.5, "completion": "b"}, r"'prompt' must be a text, got a fraction \(0.5\)"),
        ({"prompt": True, "completion": "b"}, "'prompt' must be a text, got a boolean"),
        ({"prompt": "a", "completion": " \n"}, "empty completion"),
        (
            {"prompt": "a", "completion": "b", "references": 0.5},
            "'references' must be a list of texts, got a fra",
        ),
        (
            {"prompt": "a", "completion": "b", "references": {"a": 1}},
            "'references' must be a list of texts, got an ob",
        ),
        ({"prompt": [], "completion": "b"}, "'prompt' must be a list of messages, got an empty list"),
        ({"prompt": [{"role": "user"}], "completion": "b"}, r"must be \{'role': text, 'content': text\}"),
        (
            {"prompt": [{"role": "bot", "content": ""}], "completion": "b"},
            "unknown role 'bot' .*allowed: system",
        ),
        ({"prompt": "a", "completion": [USER]}, "one assistant message"),
    ],
)
def test_a_wrong_row_says_what_is_wrong_and_where(row, message):
    with pytest.raises(DataError, match=rf"row 2: .*{message}"):
        as_examples([{"prompt": "a", "completion": "b"}, row])


def test_a_mapped_column_that_is_missing_names_the_columns_there_are():
    with pytest.raises(DataError, match="no column 'gold'; columns of this row: prompt, completion"):
        as_examples([{"prompt": "a", "completion": "b"}], Columns(references="gold"))
    with pytest.raises(DataError, match=r"the text '\{x\}' can't be filled .*columns of this row: prompt"):
        as_examples([{"prompt": "a", "completion": "b"}], Columns(prompt="{x}"))


def test_messages_exclude_prompt_and_completion():
    with pytest.raises(ValidationError, match="give either `messages`, or `prompt` and `completion`"):
        Columns(messages="chat", prompt="text")


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="data: there are no rows"):
        as_examples([])


def test_all_problems_are_counted_and_the_first_ten_kinds_shown():
    with pytest.raises(DataError) as error:
        as_examples([{f"column{i}": "a"} for i in range(13)] * 2)
    lines = str(error.value).splitlines()
    assert lines[0] == "26 problems in the data:"
    assert len(lines) == 12
    assert lines[1].endswith("(and 1 more like it)")
    assert lines[-1] == "  ... and 3 other kinds"


def test_a_problem_that_all_rows_have_is_told_once():
    with pytest.raises(DataError, match=r"^row 1: no column 'gold'; .* \(and 12 more like it\)$"):
        as_examples([{"prompt": "a", "completion": "b"}] * 13, Columns(references="gold"))


def test_skipped_rows_are_noted_apart_from_problems():
    problems = Problems(skip_rows=True)
    assert to_example({}, "f:1", problems) is None
    assert problems.found == []
    assert problems.skipped[0].startswith("f:1: ")
    problems.raise_if_any()
