"""The formats in which people have data, and what is said of data that can't be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from holdfast.errors import DataError
from holdfast.tasks import Task, as_examples, as_questions, inspect_stream, load_task, ordered_names
from holdfast.tasks.jsonl import read_examples
from holdfast.tasks.load import read_questions
from holdfast.tasks.memory import Memory, MemoryOptions
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import Columns
from holdfast.tasks.sources import TasksOptions
from holdfast.tasks.task import Example

ADAPTER: TypeAdapter = TypeAdapter(TasksOptions)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}}
CALL_READ = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# forms of a row


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            Example((USER,), "ho"),
        ),
        (
            {
                "system": "be brief",
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
            },
            Example((SYSTEM, USER), "ho"),
        ),
        ({"conversations": [USER, ANSWER]}, Example((USER,), "ho")),
        ({"instruction": "do", "input": "this", "output": "done"}, Example("do\nthis", "done")),
        ({"instruction": "do", "input": "", "output": "done"}, Example("do", "done")),
        ({"instruction": "do", "output": True}, Example("do", "true")),
        ({"prompt": "a", "response": "b"}, Example("a", "b")),
        ({"prompt": "a", "answer": False}, Example("a", "false")),
        ({"prompt": "a", "completion": True}, Example("a", "true")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}, ANSWER]},
            Example((USER,), "ho"),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]},
            Example((USER,), "ho"),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            Example((USER,), '{"name": "add", "arguments": {"a": 1, "b": "ü"}}'),
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "3"},
                    ANSWER,
                ],
                "tools": [{"type": "function", "function": {"name": "add"}}],
            },
            Example(
                (
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": [CALL_READ]},
                    {"role": "tool", "content": "3", "tool_call_id": "1"},
                ),
                "ho",
                tools=({"type": "function", "function": {"name": "add"}},),
            ),
        ),
    ],
)
def test_every_form_that_people_have_gives_its_example(row: dict[str, Any], example: Example) -> None:
    assert as_examples([row, row]) == [example, example]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "must end with the assistant's answer, got role 'user'"),
        ({"messages": [ANSWER]}, "no message before it"),
        ({"messages": "hi"}, "'messages' must be a list of messages, got str"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "unknown role 'alien' in 'conversations'; allowed: human, user, gpt",
        ),
        ({"conversations": [{"from": "human"}]}, r"must be \{'role': text, 'content': text\}"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
            r"a message in 'messages' has a part that is no text \('image_url'\)",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"must be \{'role': text, 'content': text\}",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
            "a tool call in 'messages' must have a function's name",
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    },
                ]
            },
            "the arguments of a tool call in 'messages' are no JSON",
        ),
        *(
            (
                {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}, *more]},
                said,
            )
            for more in ([], [{"role": "tool", "content": "3"}, ANSWER])
            for calls, said in (
                (["add"], "a tool call in 'messages' must have a function's name, got 'add'"),
                ('[{"name": "add"}]', "the tool calls of a message in 'messages' must be a list, got str"),
                ({"name": "add"}, "the tool calls of a message in 'messages' must be a list, got an object"),
            )
        ),
        (
            {"messages": [USER, ANSWER], "tools": [{"function": "add"}]},
            r"a tool in 'tools' must be \{'type': 'function', .* got \{'function': 'add'\}",
        ),
        ({"messages": [USER, ANSWER], "tools": "add"}, "'tools' must be a list of objects"),
        ({"prompt": "a", "completion": "b", "tools": "saw"}, "means something else needs another name"),
        ({"instruction": "do", "output": ""}, "empty completion"),
        ({"instruction": "do", "input": 0.5, "output": "x"}, "'input' must be a text, got a fraction"),
        (
            {"prompt": "a", "answer": "b", "response": "c"},
            "no column 'completion'; columns of this row: prompt, answer, response",
        ),
        ({"question": "a", "answer": "b"}, "no column 'prompt'; columns of this row: question, answer"),
        ({"prompt": "a\ud83d", "completion": "b"}, r"half a character \(U\+D83D\) is in 'prompt'"),
        ({"prompt": "a", "completion": "\udc00"}, r"half a character \(U\+DC00\) is in 'completion'"),
        (
            {"prompt": "a", "completion": "b", "references": ["b", "\udc00"]},
            r"half a character \(U\+DC00\) is in 'references'",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]},
            r"half a character \(U\+D800\) is in 'prompt'",
        ),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"row 1: .*{message}"):
        as_examples([row])


def test_columns_that_are_given_are_read_and_no_form_is_guessed() -> None:
    row = {"instruction": "do", "input": "this", "output": "done"}
    assert as_examples([row], Columns(prompt="input", completion="output")) == [Example("this", "done")]


MORE = {"role": "user", "content": "and now?"}
AGAIN = {"role": "assistant", "content": "hu"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, ANSWER, USER, ANSWER, MORE, AGAIN], "references": ["hu", "HU"]},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]),
                 "value": turn["content"]}
                for turn in (SYSTEM, ANSWER, USER, ANSWER, MORE, AGAIN)
            ],
            "references": ["hu", "HU"],
        },
    ],
)  # fmt: skip
def test_each_answer_of_a_chat_is_a_row_where_all_are_learned(row: Any, tmp_path: Path) -> None:
    """But not a greeting, before which nothing was said; right answers that are named are the last one's."""
    before = (SYSTEM, ANSWER, USER)
    each = [Example(before, "ho"), Example((*before, ANSWER, MORE), "hu", ("hu", "HU"))]
    assert as_examples([row]) == each[1:]
    assert as_examples([each[0], row], Columns(turns="all")) == [each[0], *each]
    file = write(tmp_path / "chats.jsonl", json.dumps(row))
    assert list(load_task(file, Columns.of(["turns=all"])).train) == each


def test_a_call_is_learned_and_shown_to_later_turns_in_one_form() -> None:
    framed = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    flat = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}
    for call, read in ((framed, CALL_READ), (flat, {"name": "add", "arguments": {"a": 1}})):
        chat = {"messages": [USER, call, {"role": "tool", "content": "3"}, ANSWER]}
        called, answered = as_examples([chat], Columns(turns="all"))
        arguments = read.get("function", read)["arguments"]
        assert json.loads(called.completion) == {"name": "add", "arguments": arguments}
        assert answered.prompt[1]["tool_calls"] == [read]


def test_answers_of_weight_0_are_not_learned() -> None:
    bad, good = {**ANSWER, "content": "bad", "weight": 0}, {**AGAIN, "weight": 1}
    of_all = Columns(turns="all")
    rows = as_examples([{"messages": [USER, bad, MORE, good, MORE, ANSWER]}], of_all)
    assert [row.completion for row in rows] == ["hu", "ho"]
    assert rows[0].prompt == (USER, {**ANSWER, "content": "bad"}, MORE)
    last = {"messages": [USER, good, MORE, bad]}
    assert [row.completion for row in as_examples([last], of_all)] == ["hu"]
    for row, columns in ((last, Columns()), ({"messages": [USER, bad]}, of_all)):
        with pytest.raises(
            DataError, match=r"row 1: the last answer in 'messages' has the weight 0, and no o"
        ):
            as_examples([row], columns)
    with pytest.raises(
        DataError, match=r"row 1: the weight of a message in 'messages' must be 0 or 1, got 0\.5"
    ):
        as_examples([{"messages": [USER, {**ANSWER, "weight": 0.5}]}])


def test_all_turns_of_rows_that_are_no_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"columns\.turns: 'all' is of rows of chat messages, and these are prompt"
    ):
        as_examples([{"prompt": "a", "completion": "b"}], Columns(turns="all"))
    with pytest.raises(ValidationError, match="`turns: all` is of chat messages"):
        Columns(prompt="question", turns="all")
    with pytest.raises(DataError, match=r"columns\.turns: it says what is learned"):
        read_questions(write(tmp_path / "q.jsonl", '{"prompt": "a"}'), Columns(turns="all"))
    with pytest.raises(DataError, match="must end with the assistant's answer"):
        as_examples([{"messages": [USER, ANSWER, MORE]}], Columns(turns="all"))


def test_a_tools_column_that_the_prompt_is_made_of_is_no_list_of_functions() -> None:
    row = {"question": "what for?", "tools": "saw", "answer": "wood"}
    assert as_examples([row], Columns(prompt="{tools}: {question}", completion="answer")) == [
        Example("saw: what for?", "wood")
    ]


def test_a_file_has_one_form_and_it_is_said(tmp_path: Path) -> None:
    alpaca = {"instruction": "do", "output": "done"}
    file = write(tmp_path / "a.jsonl", lines(alpaca, {"messages": [USER, ANSWER]}, {"prompt": "p"}))
    with pytest.raises(DataError) as error:
        load_task(file)
    assert f"{file}:2: written as chat messages, and the rows before it as Alpaca" in str(error.value)
    assert f"{file}:3: no column 'instruction'; columns of this row: prompt" in str(error.value)
    file.write_text(lines(alpaca))
    assert load_task(file).read_as.startswith("Alpaca")
    file.write_text(lines({"prompt": "a", "completion": "b"}))
    assert load_task(file).read_as == ""


def test_tools_survive_a_replay_memory() -> None:
    example = Example((USER,), "ho", tools=({"type": "function", "function": {"name": "f"}},))
    memory = Memory(MemoryOptions(count=1))
    memory.add(Task("a", [example], []), seed=0)
    again = Memory(MemoryOptions(count=1))
    again.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert again.examples == [example]


# files


PAIRS = [Example("a, b", "007"), Example('c "d"\ne', "NA"), Example("f", "true")]
ROWS = [{"prompt": e.prompt, "completion": e.completion} for e in PAIRS]
CSV = 'prompt,completion\n"a, b",007\n"c ""d""\ne",NA\nf,true\n'


def data_file(folder: Path, suffix: str) -> Path:
    file = folder / f"train{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(file)
        return file
    content = {
        ".jsonl": lines(*ROWS),
        ".json": json.dumps(ROWS, indent=1),
        ".csv": CSV,
        ".tsv": CSV.replace(",007", "\t007")
        .replace(",NA", "\tNA")
        .replace("f,", "f\t")
        .replace("t,c", "t\tc"),
    }
    return write(file, content[suffix])


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("sign", list(",;\t|"))
def test_a_table_is_read_by_the_delimiter_of_its_head(sign: str, suffix: str, tmp_path: Path) -> None:
    others = ",;\t|".replace(sign, "")
    head = sign.join(('"the ""prompt"", or\n' + others + '."', "completion"))
    table = write(tmp_path / f"a{suffix}", f"\n{head}\na{sign}b{others}\n")
    columns = Columns(prompt='the "prompt", or\n' + others + ".")
    assert load_task(table, columns).train == [Example("a", f"b{others}")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows_as_file_folder_and_task(tmp_path: Path, suffix: str) -> None:
    file = data_file(tmp_path / "mine", suffix) if suffix != ".parquet" else None
    if file is None:
        (tmp_path / "mine").mkdir()
        file = data_file(tmp_path / "mine", suffix)
    assert load_task(file) == Task("train", PAIRS, [])
    assert load_task(str(file.parent)) == Task("mine", PAIRS, [])
    config = {"source": "hub", "tasks": {"mine": {"path": str(file), "test": "train[2:]"}}}
    stream, problems = inspect_stream(ADAPTER.validate_python(config))
    assert problems.found == []
    assert (stream.tasks[0].train, stream.tasks[0].test) == (PAIRS, PAIRS[2:])


def test_json_lines_in_a_json_file_and_a_semicolon_table_are_read(tmp_path: Path) -> None:
    assert load_task(write(tmp_path / "a.json", lines(*ROWS))).train == PAIRS
    table = write(tmp_path / "a.csv", "\ufeffprompt;completion\na;b, c\n")
    assert load_task(table).train == [Example("a", "b, c")]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_json_lines_are_read_alike_under_both_names(bom: str, tmp_path: Path) -> None:
    bad = '{"prompt": "a", "completion": }\n'
    for text, few in ((lines(ROWS[0]), 1), (bad + lines(*ROWS), 3), (lines(*ROWS) + "\r\n" + bad, 3)):
        found = []
        for name in ("a.json", "a.jsonl"):
            problems = Problems(skip_rows=True)
            rows, _ = read_examples(write(tmp_path / name, bom + text), problems)
            found.append(([row.prompt for row in rows], len(problems.found), len(problems.skipped)))
        assert found[0] == found[1] == ([pair.prompt for pair in PAIRS[:few]], 0, few // 3)
    listed = "[" + "\n,\n".join(map(json.dumps, ROWS)) + "]"
    assert load_task(write(tmp_path / "a.json", listed)).train == PAIRS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ['stop"', 'really "fine"', '"stop" it'])
def test_quotation_marks_between_tabs_swallow_no_lines(last: str, end: str, tmp_path: Path) -> None:
    pairs = [('"Go now, he said', "A"), ("nice day", "B"), (last, "C")]
    table = end.join("\t".join(cells) for cells in [("prompt", "completion"), *pairs])
    file = write(tmp_path / "a.tsv", table + end)
    assert load_task(file).train == [Example(*pair) for pair in pairs]


def test_a_quoted_cell_may_have_tabs_and_line_breaks(tmp_path: Path) -> None:
    code = 'def f():\n\treturn "a"\n\n\tb'
    quoted = code.replace('"', '""')
    file = write(tmp_path / "a.tsv", f'prompt\tcompletion\n"{quoted}"\tx\n')
    assert load_task(file).train == [Example(code, "x")]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    text = "x" * 200_000
    assert load_task(write(tmp_path / "a.csv", f"prompt,completion\n{text},b\n")).train == [
        Example(text, "b")
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'prompt,completion\n"a\nb",c\nd\n', r"a\.csv:4: 1 cells, but the head has 2 columns"),
        ("a.csv", "prompt,completion\na,\n", r"a\.csv:2: empty completion"),
        ("a.csv", "prompt,prompt\na,b\n", r"a\.csv:1: the column 'prompt' stands in the head twice"),
        ("a.csv", 'prompt,completion\n"a"b,c\n', r"a\.csv:2: not a table: "),
        ("a.csv", b"prompt,completion\na,b\n\xff,c\n", r"a\.csv:3: not UTF-8"),
        ("a.csv", "prompt,completion\n", r"a\.csv: the data set is empty"),
        ("a.csv", "", r"a\.csv: the data set is empty"),
        ("a.csv", "text,label\na,b\n", r"a\.csv:2: no column 'prompt'; columns of this row: text, label"),
        ("a.json", "[{]", r"a\.json:1: not JSON \("),
        ("a.json", '[{"prompt": "a"}]', r"a\.json row 1: no column 'completion'"),
        ("a.json", '{"data": []}', r"a\.json:1: no column 'prompt'; columns of this row: data"),
        (
            "a.json",
            '{\n"data": [\n{}\n]}',
            r"a\.json: must be a list of rows, or a row a line, got an object",
        ),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', r"a\.json: the key 'prompt' is given twice in one"),
        ("a.jsonl", '\n{"a": 1, "a": 2}', r"a\.jsonl:2: the key 'a' is given twice in one object"),
        ("a.json", "null", r"a\.json: must be a list of rows, or a row a line, got NoneType"),
        ("a.json", b"[\xff]", r"a\.json: not UTF-8 \(byte 2\)"),
        ("a.json", "[" * 100_000, r"a\.json: not JSON that can be read \(nested too deeply\)"),
        ("a.json", "[" + "9" * 5000 + "]", r"a\.json: not JSON that can be read \(an integer of thousands"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON that can be read \(nested too deeply\)"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl:1: not JSON that can be read \(an integer of"),
        ("a.jsonl", '{"prompt": "\\ud83d", "completion": "b"}', r"a\.jsonl:1: half a character"),
        ("a.jsonl", b'\n{"prompt": "\xff"}', r"a\.jsonl:2: not UTF-8 \(byte 13 of the line\)"),
        (
            "a.jsonl",
            ("{}\n" * 9).encode("utf-16"),
            r"^\S*a\.jsonl: UTF-16, not UTF-8\. Save the file in the encoding UTF-8$",
        ),
        ("a.json", "[]".encode("utf-16"), r"a\.json: UTF-16, not UTF-8. Save the file"),
        ("a.parquet", "PAR1 nonsense", r"a\.parquet: can't be read: "),
        ("a.rtf", "x", r"data: '.*a\.rtf' is none of \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt"),
    ],
)
def test_a_bad_file_is_named_with_the_line_that_is_wrong(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_task(write(tmp_path / name, content))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = data_file(tmp_path, suffix)

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=rf"train\{suffix}: can't be read: Permission denied"):
        load_task(file)


def test_a_folder_that_may_not_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    configs = [
        ADAPTER.validate_python({"source": source, "path": str(tmp_path)})
        for source in ("jsonl", "cl_benchmark")
    ]
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(DataError, match="can't be read: Permission denied"):
        load_task(tmp_path)
    for config in configs:
        _, problems = inspect_stream(config)
        assert "can't be read: Permission denied" in problems.found[0]


def test_a_typo_in_a_path_does_not_talk_of_the_hub(tmp_path: Path) -> None:
    file = write(tmp_path / "tickets.csv", CSV)
    for wrong in (tmp_path / "ticket.csv", f"{tmp_path}/ticketss.csv"):
        with pytest.raises(DataError) as error:
            load_task(wrong)
        assert f"Did you mean '{file}'?" in str(error.value)
        assert "hub" not in str(error.value)
    with pytest.raises(DataError, match=r"There is no folder '.*/nowhere' either"):
        load_task(tmp_path / "nowhere" / "x.csv")


def test_an_id_that_is_neither_here_nor_on_the_hub_says_both() -> None:
    with pytest.raises(
        DataError,
        match=r"no file or folder 'some-one/some-thing' \(looked in /.*as a data set of the hub it can't be",
    ):
        load_task("some-one/some-thing")


def test_a_data_set_of_the_hub_is_loaded_with_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_dict({"prompt": ["a"], "completion": [1]}, features=features)
    asked: list[str] = []

    def load_dataset(path: str) -> datasets.DatasetDict:
        asked.append(path)
        return datasets.DatasetDict({"train": part, "test": part})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("me/mine") == Task("me/mine", [Example("a", "yes")], [Example("a", "yes")])
    assert asked == ["me/mine"]


def calling(name: str, argument: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": {argument: "x"}}}
    kinds = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": kinds}}],
    }


def test_rows_from_arrow_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    rows = [calling("weather", "city"), calling("stock", "ticker")]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    written = load_task(write(tmp_path / "a.jsonl", lines(*rows))).train
    assert written[0].completion == '{"name": "weather", "arguments": {"city": "x"}}'
    for found in (load_task(tmp_path / "a.parquet").train, load_task(tmp_path / "saved").train):
        assert found == written
    assert as_examples(table) == written
    null = {"name": "weather", "arguments": {"city": None}}
    said = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [null]}]}
    assert json.loads(as_examples([said])[0].completion) == null


def test_class_labels_are_their_names_from_disk_and_from_python(tmp_path: Path) -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.ClassLabel(names=["no", "yes"])}
    )
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": [1, 0]}, features=features)
    table.save_to_disk(tmp_path / "d")
    assert as_examples(table) == load_task(tmp_path / "d").train == [Example("a", "yes"), Example("b", "no")]
    asked = table.rename_columns({"completion": "prompt", "prompt": "id"})
    assert [question.prompt for question in as_questions(asked)] == ["yes", "no"]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    assert load_task(tmp_path / "d") == Task("d", PAIRS, [])
    (tmp_path / "d" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"/d: can't be read: "):
        load_task(tmp_path / "d")


def test_a_folder_with_two_training_files_asks_which(tmp_path: Path) -> None:
    data_file(tmp_path, ".csv")
    data_file(tmp_path, ".jsonl")
    with pytest.raises(DataError, match=r"which one is meant\? It holds train\.jsonl, train\.csv"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ('["a", ""]', r"labels\.json: answer 2 is empty; there must be something to tell it from"),
        ('["a", " "]', r"labels\.json: answer 2 is empty"),
        ('["a", "b", "a"]', r"labels\.json: the answer 'a' stands in it twice"),
        ('["a", "\\ud83d"]', r"labels\.json: answer 2 has half a character \(U\+D83D\)"),
        ("[" * 100_000, r"labels\.json: not JSON that can be read \(nested too deeply\)"),
        ("[" + "9" * 5000 + "]", r"labels\.json: not JSON that can be read \(an integer of thousands"),
        (b"\xff", r"labels\.json: not UTF-8 \(byte 1\)"),
    ],
)
def test_labels_that_cannot_be_told_apart_or_read_are_named(
    tmp_path: Path, labels: bytes | str, message: str
) -> None:
    write(tmp_path / "t" / "train.jsonl", lines(*ROWS))
    write(tmp_path / "t" / "test.jsonl", lines(*ROWS))
    write(tmp_path / "t" / "labels.json", labels)
    _, problems = inspect_stream(ADAPTER.validate_python({"source": "jsonl", "path": str(tmp_path)}))
    with pytest.raises(DataError, match=message):
        problems.raise_if_any()
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "t")


def test_empty_and_repeated_options_in_a_configuration_are_refused() -> None:
    config = {"source": "jsonl", "path": "x"}
    with pytest.raises(ValidationError, match="answer 2 is empty"):
        ADAPTER.validate_python({**config, "options": {"a": ["x", ""]}})
    with pytest.raises(ValidationError, match="the answer 'x' stands in it twice"):
        ADAPTER.validate_python({**config, "options": {"a": ["x", "x"]}})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "completion": "b", "id": 1, "references": ["b"]}, ""),
        ({"prompt": "a", "completion": "b", "system": ""}, ""),
        ({"": 0, "prompt": "a", "completion": "b"}, ""),  # the index of a data frame
        (
            {"prompt": "a", "completion": "b", "system": "Be brief."},
            "prompt and completion; columns that are not read: system",
        ),
        (
            {"instruction": "a", "input": "", "output": "b", "system": "s", "history": [["x", "y"]]},
            "Alpaca: instruction, a line break and input; output; columns that are not read: system, history",
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            "ShareGPT: conversations",
        ),
        (
            {"messages": [{**USER, "id": 1}, {**ANSWER, "refusal": None, "reasoning_content": "hm"}]},
            "chat messages; columns that are not read: messages.reasoning_content",
        ),
        (
            {"prompt": [USER], "completion": [{**ANSWER, "thinking": "hm"}]},
            "prompt and completion; columns that are not read: completion.thinking",
        ),
    ],
)
def test_columns_that_hold_something_and_are_not_read_are_told(tmp_path: Path, row: Any, told: str) -> None:
    file = write(tmp_path / "a.jsonl", lines(row))
    assert load_task(file).read_as == told


# an order in which a task comes again


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        for part in ("train", "test"):
            rows = [{"prompt": f"{name} {part} {i}", "completion": "x"} for i in range(30)]
            write(tmp_path / name / f"{part}.jsonl", lines(*rows))
    return tmp_path


def source(folder: Path, **more: Any) -> Any:
    return ADAPTER.validate_python(
        {"source": "jsonl", "path": str(folder), "train_rows": 7, "test_rows": 3, **more}
    )


def test_a_task_that_comes_again_has_the_same_rows_and_a_name_of_its_own(folder: Path) -> None:
    config = source(folder, order=["a", "b", "A", "a"], metric={"a": "rouge_l"})
    stream, problems = inspect_stream(config)
    assert problems.found == []
    assert stream.names == ["a", "b", "a (2)", "a (3)"]
    assert [task.same_as for task in stream] == ["", "", "a", "a"]
    first, _, second, third = stream
    assert first.train == second.train == third.train
    assert first.test == second.test == third.test
    assert [task.metric for task in stream] == ["rouge_l", "exact_match", "rouge_l", "rouge_l"]
    alone, _ = inspect_stream(source(folder, order=["a"]))
    assert alone.tasks[0].train == first.train


def test_a_task_with_the_name_of_a_repetition_is_refused(folder: Path) -> None:
    (folder / "b").rename(folder / "a (2)")
    assert inspect_stream(source(folder, order=["a", "a (2)"]))[1].found == []
    _, problems = inspect_stream(source(folder, order=["a", "a"]))
    assert (
        "tasks.order: a task that comes again would be called 'a (2)', and the source has"
        in (problems.found[0])
    )
    _, problems = inspect_stream(source(folder, order=["a", "a (2)", "a"]))
    assert "would be called 'a (2)'" in problems.found[0]


def test_names_of_an_order_are_told_without_reading_a_row(folder: Path) -> None:
    for file in folder.rglob("*.jsonl"):
        file.write_text("broken")
    problems = Problems()
    assert ordered_names(source(folder, order=["A", "b", "a"]), problems) == ["a", "b", "a (2)"]
    assert ordered_names(source(folder), problems) == ["a", "b"]
    assert problems.found == []
    assert ordered_names(source(folder, order=["c"]), problems) == []
    assert "no task 'c'" in problems.found[0]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["copy", "flip", "head"]), min_size=1, max_size=7))
def test_names_of_an_order_are_those_of_its_stream_and_extend_each_other(order: list[str]) -> None:
    config = ADAPTER.validate_python({"source": "toy", "order": order, "train_rows": 4, "test_rows": 2})
    stream, _ = inspect_stream(config)
    names = ordered_names(config, Problems())
    assert names == stream.names
    assert len({*names}) == len(order)
    longer = ordered_names(config.model_copy(update={"order": (*order, order[0])}), Problems())
    assert longer[:-1] == names
