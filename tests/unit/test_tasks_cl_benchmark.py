"""CL_Benchmark folders in both published shapes, made up here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from holdfast.errors import DataError
from holdfast.tasks import ClBenchmarkSource, Task, build_stream
from holdfast.tasks.task import Example


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Sentences with labels, in two groups, as O-LoRA lays them out."""
    for group, name in (("TC", "agnews"), ("SC", "SST-2"), ("SC", "IMDB")):
        for split in ("train", "dev", "test"):
            rows = [
                {"sentence": f"{split} {{options}} {i}", "label": ("Good", "Bad")[i % 2]} for i in range(4)
            ]
            write_json(tmp_path / group / name / f"{split}.json", rows)
        write_json(tmp_path / group / name / "labels.json", ["Bad", "Good"])
    return tmp_path


@pytest.fixture
def defined(tmp_path: Path) -> Path:
    """Definition and Instances, as SAPT lays them out."""
    for group, name, definition in (
        ("SuperNI", "task002_made_up", ["Answer it. "]),
        ("Long_Sequence", "boolq", "Yes or no?"),
        ("Long_Sequence", "copa", []),
    ):
        for split in ("train", "test"):
            instances = [{"input": "one", "output": ["x", "y"]}, {"input": "two", "output": "z"}]
            write_json(
                tmp_path / group / name / f"{split}.json",
                {"Definition": definition, "Positive Examples": [], "Instances": instances},
            )
    return tmp_path


def tasks_of(path: Path, **options: object) -> dict[str, Task]:
    return {task.name: task for task in build_stream(ClBenchmarkSource(path=path, **options))}


def test_labelled_data_get_their_groups_instruction_and_their_options(labelled):
    tasks = tasks_of(labelled, order=["agnews", "sst2"], instructions={"TC": "Topic? ", "SC": "Mood? "})
    assert list(tasks) == ["agnews", "SST-2"]
    first = tasks["agnews"].train[0]
    assert first == Example("Topic? Option: Bad, Good\ntrain {options} 0\nAnswer:", "Good")
    assert tasks["SST-2"].test[1].prompt == "Mood? Option: Bad, Good\ntest {options} 1\nAnswer:"
    assert tasks["agnews"].options == ("Bad", "Good")


def test_instructions_can_stand_in_a_file_and_name_a_data_set(labelled):
    items = [
        {"instruction_type": "few-shot", "instruction": "no"},
        {"instruction_type": "zero-shot", "instruction": "Mood? "},
    ]
    write_json(labelled / "instructions.json", {"SC": items, "IMDB": items[1:]})
    path = labelled / "instructions.json"
    assert (
        tasks_of(labelled, order=["IMDB"], instructions=path)["IMDB"]
        .train[0]
        .prompt.startswith("Mood? Option")
    )


def test_the_dev_file_can_be_tested_on_and_the_metric_can_use_the_labels(labelled):
    task = tasks_of(labelled, order=["IMDB"], test_file="dev", metric="options")["IMDB"]
    assert "dev {options} 0" in task.test[0].prompt
    assert (task.metric, task.options) == ("options", ("Bad", "Good"))


def test_defined_data_get_definition_and_every_right_answer(defined):
    tasks = tasks_of(defined, order=["002", "boolqa", "copa"])
    assert list(tasks) == ["task002_made_up", "boolq", "copa"]
    assert tasks["task002_made_up"].train == [
        Example(f"Definition: Answer it.\n\nNow complete the following example -\nInput: {i}\nOutput: ", o, r)
        for i, o, r in (("one", "x", ("x", "y")), ("two", "z", ()))
    ]
    assert tasks["boolq"].train[1].prompt == "Yes or no?\ntwo\nOutput: "
    assert tasks["copa"].train[1].prompt == "two\nOutput: "


def test_the_frame_can_be_given(defined):
    task = tasks_of(defined, order=["boolq"], prompt="{input} ({instruction})")["boolq"]
    assert task.train[0].prompt == "one (Yes or no?\n)"
    with pytest.raises(ValidationError, match=r"the text must contain \{input\}, got 'Answer:'"):
        ClBenchmarkSource(path=defined, prompt="Answer:")


def test_a_single_group_can_be_given_as_the_root(defined):
    assert list(tasks_of(defined / "Long_Sequence")) == ["boolq", "copa"]


def test_a_data_set_of_two_groups_is_called_by_both_names(labelled):
    (labelled / "SC" / "IMDB").rename(labelled / "SC" / "agnews")
    assert list(tasks_of(labelled)) == ["SST-2", "SC/agnews", "TC/agnews"]
    with pytest.raises(DataError, match=r"no task 'agnews'\. .*Allowed: SST-2, SC/agnews, TC/agnews"):
        tasks_of(labelled, order=["agnews"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", r"IMDB/train.json:1: not JSON"),
        (
            '{"Instances": []}',
            "must be a list of {sentence, label}, or an object with 'Definition' and 'Instances'",
        ),
        ("3", "must be a list of {sentence, label}"),
        ("[]", "IMDB/train.json: the data set is empty"),
        ('{"Definition": 3, "Instances": []}', "'Definition' must be a text or a list of texts"),
        ('[{"sentence": "a", "label": "b"}, {"sentence": "a"}]', "instance 2: no column 'label'"),
        ('[{"sentence": "a", "label": ""}]', "instance 1: empty completion"),
        (
            '[{"sentence": "a", "label": []}]',
            "instance 1: 'label' must be a list of messages, got an empty list",
        ),
        ('[{"sentence": "a", "label": ["x", 0.5]}]', "instance 1: 'references' must be a text"),
        ("[3]", "instance 1: a row must be an object"),
    ],
)
def test_malformed_data_are_named(labelled, content, message):
    write_json(labelled / "SC" / "IMDB" / "train.json", content)
    with pytest.raises(DataError, match=message):
        tasks_of(labelled, order=["IMDB"])


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ({"TC": "Topic?"}, "tasks.instructions: none for 'IMDB' nor its group 'SC'; given: TC"),
        ("nowhere.json", "nowhere.json: can't be read: No such file"),
        ("bad.json", r"must be JSON of the form \{group: "),
    ],
)
def test_wrong_instructions_are_named(labelled, monkeypatch, instructions, message):
    monkeypatch.chdir(labelled)
    write_json(labelled / "bad.json", {"SC": [{"instruction_type": "few-shot", "instruction": "x"}]})
    with pytest.raises(DataError, match=message):
        tasks_of(labelled, order=["IMDB"], instructions=instructions)


def test_a_missing_root_or_an_empty_one_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tasks\.path: no folder"):
        tasks_of(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no <group>/<dataset>/train.json below it"):
        tasks_of(tmp_path)


def test_a_missing_test_file_is_named(labelled):
    (labelled / "SC" / "IMDB" / "test.json").unlink()
    with pytest.raises(DataError, match=r"IMDB/test.json: can't be read"):
        tasks_of(labelled, order=["IMDB"])
