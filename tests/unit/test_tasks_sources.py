"""Sources of tasks: what a configuration gives, and what it says when the data are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from holdfast.config import override
from holdfast.errors import DataError
from holdfast.tasks import TaskStream, build_stream, inspect_stream, load_task
from holdfast.tasks.options import left_out, subsample
from holdfast.tasks.rows import Columns, as_examples
from holdfast.tasks.sources import TasksOptions
from holdfast.tasks.task import Example

ADAPTER: TypeAdapter = TypeAdapter(TasksOptions)


def stream_of(**config: object) -> TaskStream:
    return build_stream(ADAPTER.validate_python(config))


def write_rows(path: Path, count: int, word: str = "p") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{word} {i}", "completion": str(i % 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("agnews", "dbpedia", "task002"):
        write_rows(tmp_path / name / "train.jsonl", 20, name)
        write_rows(tmp_path / name / "test.jsonl", 9, f"{name} test")
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_a_folder_of_jsonl_files_is_a_stream_in_the_given_order(folder):
    stream = stream_of(source="jsonl", path=str(folder), order=["002", "AGNews"])
    assert stream.names == ["task002", "agnews"]
    assert [len(task.train) for task in stream] == [20, 20]
    assert stream.tasks[1].test[0] == Example("agnews test 0", "0")
    assert stream.tasks[0].metric == "exact_match"
    assert stream_of(source="jsonl", path=str(folder)).names == ["agnews", "dbpedia", "task002"]


def test_rows_of_a_task_depend_on_the_seed_and_on_nothing_else(folder):
    def rows(run_seed: int = 0, **more: object) -> list[Example]:
        config = {"source": "jsonl", "path": str(folder), "train_rows": 5, "test_rows": 4} | more
        stream = build_stream(ADAPTER.validate_python(config), run_seed)
        task = next(task for task in stream if task.name == "dbpedia")
        return [*task.train, *task.test]

    assert len(rows()) == 9
    assert rows() == rows(order=["dbpedia"]) == rows(order=["task002", "dbpedia", "agnews"])
    assert rows(run_seed=1) != rows()
    assert rows(run_seed=99, seed=1) == rows(run_seed=1)


@settings(deadline=None)
@given(total=st.integers(1, 60), small=st.integers(1, 60), more=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_smaller_draw_is_part_of_a_larger_one_and_keeps_the_order(total, small, more, seed):
    rows = [Example(str(i), "x") for i in range(total)]
    few, many = (list(subsample(rows, n, seed, "task", "train")) for n in (small, small + more))
    assert len(few) == min(small, total)
    assert set(few) <= set(many)
    assert few == sorted(few, key=lambda row: int(row.prompt))


@pytest.mark.parametrize("seed", range(5))
def test_no_chat_is_trained_on_and_tested_in_other_rows(seed: int) -> None:
    says = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"})
    chats = [
        {"messages": [{"role": "system", "content": f"chat {n}"}, *says * (1 + n % 4)]} for n in range(40)
    ]
    rows = as_examples(chats, Columns(turns="all"))
    limit = round(0.9 * len(rows))
    drawn, rest = (list(draw(rows, limit, seed, "task", "train")) for draw in (subsample, left_out))
    assert len(drawn) == limit
    assert len(drawn) + len(rest) > len(rows) - 4  # of one chat at most some rows are in neither
    assert not {row.prompt[0]["content"] for row in drawn} & {row.prompt[0]["content"] for row in rest}


def test_different_tasks_and_splits_draw_differently():
    rows = [Example(str(i), "x") for i in range(200)]
    draws = [
        tuple(subsample(rows, 20, 0, *stream)) for stream in (("a", "train"), ("a", "test"), ("b", "train"))
    ]
    assert len(set(draws)) == 3


def test_the_draw_is_the_same_on_every_machine():
    rows = [Example(str(i), "x") for i in range(10)]
    assert [row.prompt for row in subsample(rows, 4, 0, "agnews", "train")] == ["3", "5", "7", "9"]


def test_metric_and_options_a_task(folder):
    (folder / "dbpedia" / "labels.json").write_text('["0", "1", "2"]')
    stream = stream_of(
        source="jsonl",
        path=str(folder),
        metric={"dbpedia": "options", "002": "rouge_l", "agnews": "options"},
        options={"agnews": ["0", "1", "2", "3"]},
    )
    assert [task.metric for task in stream] == ["options", "options", "rouge_l"]
    assert [task.options for task in stream] == [("0", "1", "2", "3"), ("0", "1", "2"), ()]


def test_names_that_begin_with_the_same_number_are_different_tasks(tmp_path: Path) -> None:
    labels = {"2024_01": ["0", "1", "2"], "2024_02": ["0", "1", "2", "3"]}
    for name in labels:
        write_rows(tmp_path / name / "train.jsonl", 6, name)
        write_rows(tmp_path / name / "test.jsonl", 3, f"{name} test")
    source = {"source": "jsonl", "path": str(tmp_path)}
    each = stream_of(**source, metric={"2024_01": "exact_match", "2024_02": "rouge_l"})
    assert [task.metric for task in each] == ["exact_match", "rouge_l"]
    one = stream_of(**source, metric={"2024_02": "rouge_l"})
    assert [task.metric for task in one] == ["exact_match", "rouge_l"]
    allowed = stream_of(**source, metric="options", options=labels)
    assert [list(task.options) for task in allowed] == list(labels.values())
    with pytest.raises(DataError, match=r"tasks\.order: no task '2024_03'\."):
        stream_of(**source, order=["2024_01", "2024_03"])


@pytest.mark.parametrize("metric", ["rouge_l", None, {"agnews": "rouge_l"}])
def test_options_without_their_metric_say_what_to_set_and_that_works(metric: Any, folder: Path) -> None:
    config = {
        "source": "jsonl",
        "path": str(folder),
        "options": {"dbpedia": ["0", "1", "2"]},
        "metric": metric,
    }
    with pytest.raises(DataError, match=r"tasks\.options\.dbpedia: does nothing") as error:
        stream_of(**config)
    advice = str(error.value).partition("or set ")[2].split("\n")[0].rstrip(".").replace("'", "")
    mended = override({"tasks": config}, [advice])["tasks"]
    assert [task.metric for task in stream_of(**mended) if task.name == "dbpedia"] == ["options"]


def test_two_keys_of_one_task_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.metric: '002' and 'task002' are both the task 'task002'"):
        stream_of(source="jsonl", path=str(folder), metric={"002": "rouge_l", "task002": "exact_match"})


def test_messages_and_other_columns_are_read_from_jsonl(tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / "a" / f"{split}.jsonl", 0)
        (tmp_path / "a" / f"{split}.jsonl").write_text('{"q": "x", "a": "y"}\n')
    stream = stream_of(source="jsonl", path=str(tmp_path), columns={"prompt": "q", "completion": "a"})
    assert stream.tasks[0].train == [Example("x", "y")]


def test_a_byte_order_mark_windows_line_ends_and_empty_lines_are_harmless(folder):
    (folder / "agnews" / "train.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n{"prompt": "c", "completion": "d"}'
    )
    task = stream_of(source="jsonl", path=str(folder), order=["agnews"]).tasks[0]
    assert task.train == [Example("a", "b"), Example("c", "d")]


def test_an_order_of_other_tasks_is_told_in_one_line(folder):
    with pytest.raises(DataError, match=r"^tasks\.order: no tasks 'mnli', 'cb', .*'yahoo'\. Allowed: "):
        stream_of(source="jsonl", path=str(folder), order="L1")
    with pytest.raises(DataError, match=r"^tasks\.order: 'S1' is an order of other tasks: no tasks '157"):
        stream_of(source="toy", order="S1")
    with pytest.raises(
        DataError, match=r"no tasks 'agnew', 'task03'\. Did you mean 'agnews' and 'task002'\?"
    ):
        stream_of(source="jsonl", path=str(folder), order=["agnew", "dbpedia", "task03", "agnew"])


def test_all_problems_of_all_tasks_are_found_in_one_go(folder):
    (folder / "agnews" / "train.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n{"text": "a"}\n'
        '{"prompt": "a", "completion": ""}\n'
    )
    (folder / "dbpedia" / "test.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    (folder / "task002" / "test.jsonl").write_text("\n")
    with pytest.raises(DataError) as error:
        stream_of(source="jsonl", path=str(folder), order=["agnews", "dbpedia", "task002", "yahoo"])
    text = str(error.value)
    assert text.startswith("6 problems in the data:")
    assert "tasks.order: no task 'yahoo'. Allowed: agnews, dbpedia, task002." in text
    assert f"{folder}/agnews/train.jsonl:2: not JSON (" in text
    assert f"{folder}/agnews/train.jsonl:3: written as running text, and the rows before it as prompt" in text
    assert f"{folder}/agnews/train.jsonl:4: empty completion" in text
    assert f"{folder}/dbpedia/test.jsonl:1: not UTF-8 (byte 13 of the line)" in text
    assert f"{folder}/task002/test.jsonl: the data set is empty" in text


def test_inspect_stream_hands_back_problems_and_what_could_be_read(folder):
    (folder / "agnews" / "train.jsonl").write_text("nonsense\n" * 30 + '{"prompt": "a", "completion": "b"}\n')
    stream, problems = inspect_stream(ADAPTER.validate_python({"source": "jsonl", "path": str(folder)}))
    assert len(problems.found) == 30
    assert stream.tasks[0].train == [Example("a", "b")]


def test_building_a_stream_tells_which_rows_are_left_out_and_how_others_are_read(folder: Path) -> None:
    chats = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2
    (folder / "chats").mkdir()
    for part in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in chats)
        (folder / "chats" / f"{part}.jsonl").write_text(lines)
    (folder / "agnews" / "train.jsonl").write_text('nonsense\n{"prompt": "a", "completion": "b"}\n')
    config = ADAPTER.validate_python({"source": "jsonl", "path": str(folder), "bad_rows": "skip"})
    told: list[str] = []
    build_stream(config, 0, told.append)
    assert len(told) == 2
    assert told[0].startswith(f"1 bad row is left out, such as {folder}/agnews/train.jsonl:1")
    assert told[1].startswith("chats: read as ")


def test_bad_rows_are_left_out_and_noted_if_that_is_asked_for(folder):
    (folder / "agnews" / "train.jsonl").write_text('nonsense\n{"prompt": "a", "completion": "b"}\n')
    config = ADAPTER.validate_python({"source": "jsonl", "path": str(folder), "bad_rows": "skip"})
    stream, problems = inspect_stream(config)
    assert stream.tasks[0].train == [Example("a", "b")]
    assert problems.found == []
    assert problems.skipped[0].startswith(f"{folder}/agnews/train.jsonl:1: not JSON")
    (folder / "agnews" / "train.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"train.jsonl: no usable row is left after skipping"):
        build_stream(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"order": ["agnew"]},
            "tasks.order: no task 'agnew'. Did you mean 'agnews'\\? Allowed: agnews, dbpedia",
        ),
        ({"order": []}, "tasks.order: it is empty"),
        ({"order": "L9"}, "no order 'L9'. Allowed: L1, L2, L3, S1, S2. Or give a list"),
        (
            {"metric": {"agnew": "rouge_l"}},
            "tasks.metric: no task 'agnew' in the stream. Did you mean 'agnews'",
        ),
        ({"options": {"x": ["a"]}}, "tasks.options: no task 'x' in the stream"),
        (
            {"metric": "options", "order": ["agnews"]},
            "'options' needs the allowed answers: give tasks.options.agnews",
        ),
        (
            {"metric": "options", "order": ["agnews"], "options": {"agnews": ["0", "1"]}},
            r"task 'agnews': the answer '2' is none of its options \(0, 1\)",
        ),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(folder, config, message):
    with pytest.raises(DataError, match=message):
        stream_of(source="jsonl", path=str(folder), **config)


def test_a_missing_folder_file_or_sub_folder_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"tasks.path: no folder '.*/nowhere' \(looked in /"):
        stream_of(source="jsonl", path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"it holds train\.jsonl itself: give the folder above it"):
        stream_of(source="jsonl", path=str(folder / "agnews"))
    with pytest.raises(
        DataError, match=r"must have a sub-folder with train\.jsonl for each task; found none"
    ):
        stream_of(source="jsonl", path=str(folder / "notes"))
    (folder / "agnews" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"agnews/test.jsonl: can't be read: No such file"):
        stream_of(source="jsonl", path=str(folder))


@pytest.mark.parametrize("labels", ["{", "[]", '{"a": 1}', "[1]"])
def test_a_broken_labels_file_is_named(folder, labels):
    (folder / "agnews" / "labels.json").write_text(labels)
    with pytest.raises(DataError, match=r"agnews/labels.json(:1: not JSON|: must be a list of texts)"):
        stream_of(source="jsonl", path=str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "jsonl", "path": "x", "order": [73]}, "YAML read this name as 73; write it in quotes"),
        ({"source": "jsonl"}, "Field required"),
        ({"source": "json", "path": "x"}, "'cl_benchmark', 'hub', 'jsonl', 'toy'"),
        ({"source": "jsonl", "path": "x", "train_rows": 0}, "greater than or equal to 1"),
        ({"source": "jsonl", "path": "x", "metric": "bleu"}, "'sari' or 'perplexity'"),
        ({"source": "toy", "path": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_section_is_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(config)


def test_a_single_task_is_loaded_from_a_folder_or_a_file(folder):
    task = load_task(folder / "agnews")
    assert (task.name, len(task.train), len(task.test)) == ("agnews", 20, 9)
    task = load_task(str(folder / "agnews" / "test.jsonl"))
    assert (task.name, len(task.train), len(task.test)) == ("test", 9, 0)
    (folder / "agnews" / "test.jsonl").unlink()
    assert len(load_task(folder / "agnews").test) == 0


def test_a_single_task_that_is_not_there_says_what_to_give(folder):
    with pytest.raises(
        DataError, match=r"data: no '.*notes/train.jsonl'; give a file \(\.jsonl, .*, or a folder"
    ):
        load_task(folder / "notes")
    (folder / "agnews" / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:1: no column 'completion'"):
        load_task(folder / "agnews")
