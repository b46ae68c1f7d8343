"""Tasks through the ``datasets`` library: local tables, and hub ids where no hub can be reached."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from pydantic import ValidationError

from holdfast.errors import DataError
from holdfast.tasks import HubSource, Task, as_examples, build_stream
from holdfast.tasks.task import Example

ROWS = [{"text": f"t{i}", "label": i % 2, "extra": 0.5} for i in range(10)]
COLUMNS = {"prompt": "text", "completion": "label"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def task_of(**spec: object) -> Task:
    options = {"columns": COLUMNS} | spec
    return build_stream(HubSource(tasks={"mine": options})).tasks[0]


def write_table(path: Path, rows: list[dict] = ROWS) -> str:
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        table.to_csv(path, index=False, sep="\t")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_one_local_table_is_split_as_asked(tmp_path, suffix):
    task = task_of(path=write_table(tmp_path / f"d{suffix}"), train="train[:80%]", test="train[80%:]")
    assert (len(task.train), len(task.test)) == (8, 2)
    assert task.train[1] == Example("t1", "1")


def test_a_folder_of_save_to_disk_is_split_as_asked(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "alone")
    task = task_of(path=str(tmp_path / "alone"), train="train[:80%]", test="train[80%:]")
    assert (len(task.train), len(task.test)) == (8, 2)
    assert task.train[1] == Example("t1", "1")
    splits = {"train": table, "validation": table.select(range(3))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert len(task_of(path=str(tmp_path / "both"), test="validation").test) == 3
    with pytest.raises(DataError, match=r"split 'test' of '.*both' can't be loaded"):
        task_of(path=str(tmp_path / "both"))
    with pytest.raises(ValueError, match="save_to_disk"):
        task_of(path=str(tmp_path / "both"), revision="main")


def test_a_file_for_each_split(tmp_path):
    files = {split: write_table(tmp_path / f"{split}.csv") for split in ("train", "test")}
    task = task_of(path=files)
    assert (len(task.train), len(task.test)) == (10, 10)


def test_class_labels_are_read_as_their_names(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    table.to_parquet(tmp_path / "d.parquet")
    task = task_of(path=str(tmp_path / "d.parquet"), test="train")
    assert [row.completion for row in task.train] == ["neg", "pos"]


def test_rows_are_subsampled_and_the_order_may_differ_from_the_mapping(tmp_path):
    spec = {"path": write_table(tmp_path / "d.csv"), "test": "train", "columns": COLUMNS}
    stream = build_stream(HubSource(tasks={"a": spec, "b": spec}, order=["b", "a"], train_rows=3))
    assert stream.names == ["b", "a"]
    assert [len(task.train) for task in stream] == [3, 3]


def test_faults_in_rows_are_named_by_file_split_and_row(tmp_path):
    path = write_table(tmp_path / "d.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": None}])
    with pytest.raises(DataError, match=r"d\.jsonl:2: 'label' must be a text, got nothing \(null\)"):
        task_of(path=path, test="train")
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: no column 'question'; columns of this row: text, label"
    ):
        task_of(path=path, test="train[:1]", train="train[:1]", columns={"prompt": "question"})


def test_a_missing_split_says_how_to_split_one_file(tmp_path):
    with pytest.raises(
        DataError, match=r"tasks.tasks.mine: split 'test' of .*use train: 'train\[:80%\]' and test"
    ):
        task_of(path=write_table(tmp_path / "d.csv"))


def test_a_malformed_file_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a"\nnonsense')
    with pytest.raises(DataError, match=r"(?s)2 problems.*d\.jsonl:1: not JSON.*d\.jsonl:2: not JSON"):
        task_of(path=str(tmp_path / "d.jsonl"), test="train")


def test_missing_and_mixed_files_are_named(tmp_path):
    table = write_table(tmp_path / "d.csv")
    with pytest.raises(DataError, match=r"tasks.tasks.mine.path: no file 'nowhere.csv' \(looked in /"):
        task_of(path="nowhere.csv")
    other = write_table(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"files must be of one kind of .*got .csv, .parquet"):
        task_of(path={"train": table, "test": other})


def test_a_hub_id_that_cannot_be_reached_is_named():
    with pytest.raises(
        DataError, match=r"tasks\.tasks\.mine: split 'train' of 'someone/something' can't be loaded"
    ):
        task_of(path="someone/something")


def test_an_empty_mapping_is_refused():
    with pytest.raises(ValidationError, match="at least 1 item"):
        HubSource(tasks={})


def test_a_dataset_in_memory_gives_examples():
    table = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert as_examples(table) == [Example("a", "b")]
