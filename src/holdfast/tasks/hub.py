"""Tasks from the Hugging Face hub or from local tables, through the ``datasets`` library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from holdfast.config import Options
from holdfast.tasks.jsonl import note_if_empty
from holdfast.tasks.options import Name, SourceOptions
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import STANDARD, Columns, to_example
from holdfast.tasks.task import Example, Task

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


class HubTask(Options):
    """One data set: where it is, which splits are used, and which column holds what.

    A column of class labels is read as the labels' names.
    """

    path: str | dict[Literal["train", "test"], str] = Field(
        description="hub id, a local file, or {train: file, test: file}"
    )
    config: str | None = Field(
        default=None, description="the data set's configuration, such as 'sst2' of 'glue'"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    train: str = Field(default="train", description="split to train on, such as 'train[:80%]'")
    test: str = Field(default="test", description="split to test on, such as 'validation' or 'train[80%:]'")
    columns: Columns = STANDARD


class HubSource(SourceOptions):
    """A data set of the Hugging Face hub, or local json, csv or parquet files, for each task."""

    source: Literal["hub"] = "hub"
    tasks: dict[Name, HubTask] = Field(min_length=1, description="task name to data set")

    def available(self, problems: Problems) -> list[str]:
        return list(self.tasks)

    def read(self, name: str, problems: Problems, seed: int) -> Task | None:
        spec = self.tasks[name]
        train = _rows(name, spec, spec.train, problems)
        test = _rows(name, spec, spec.test, problems) if self.test_split == "test" else []
        return Task(name, train, test)


def _rows(name: str, spec: HubTask, split: str, problems: Problems) -> list[Example]:
    dataset = _load(name, spec, split, problems)
    if dataset is None:
        return []
    source = spec.path if isinstance(spec.path, str) else name
    labels = {
        column: feature.names for column, feature in dataset.features.items() if hasattr(feature, "int2str")
    }
    examples = []
    for number, row in enumerate(dataset, start=1):
        named: dict[str, Any] = dict(row)
        for column, names in labels.items():
            value = named[column]  # -1 marks a hidden label in test splits of the hub
            named[column] = names[value] if value is not None and value >= 0 else None
        example = to_example(named, f"{source}[{split}] row {number}", problems, spec.columns)
        if example is not None:
            examples.append(example)
    note_if_empty(examples, f"{source}[{split}]", problems)
    return examples


def _load(name: str, spec: HubTask, split: str, problems: Problems) -> Dataset | None:
    """One split, or None where it can't be had: whatever ``datasets`` raises is a problem here."""
    where, request = f"tasks.tasks.{name}", _request(name, spec, problems)
    if request is None:
        return None
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return load_dataset(**request, split=split)
    except Exception as error:
        cause = error.__cause__ or error
        problems.add(
            where, f"split '{split}' of '{spec.path}' can't be loaded: {_first_line(cause)}{_advice(spec)}"
        )
        return None


def _request(name: str, spec: HubTask, problems: Problems) -> dict[str, Any] | None:
    """Arguments for load_dataset: a hub id, or a format and local files."""
    where = f"tasks.tasks.{name}.path"
    if isinstance(spec.path, str) and Path(spec.path).suffix not in FORMATS:
        return {"path": spec.path, "name": spec.config, "revision": spec.revision}
    files = {"train": spec.path} if isinstance(spec.path, str) else {str(k): v for k, v in spec.path.items()}
    suffixes = {Path(file).suffix for file in files.values()}
    missing = [file for file in files.values() if not Path(file).expanduser().is_file()]
    if missing:
        problems.add(where, f"no file '{missing[0]}' (looked in {Path().resolve()})")
        return None
    if len({FORMATS.get(suffix) for suffix in suffixes}) != 1 or not suffixes <= set(FORMATS):
        problems.add(
            where, f"files must be of one kind of {', '.join(FORMATS)}, got {', '.join(sorted(suffixes))}"
        )
        return None
    request: dict[str, Any] = {
        "path": FORMATS[min(suffixes)],
        "data_files": {key: str(Path(file).expanduser()) for key, file in files.items()},
    }
    if suffixes == {".tsv"}:
        request["sep"] = "\t"
    return request


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _advice(spec: HubTask) -> str:
    if isinstance(spec.path, str) and Path(spec.path).suffix in FORMATS:
        return (
            ". A single file has the split 'train' only: use train: 'train[:80%]' and test: 'train[80%:]', "
            "or path: {train: FILE, test: FILE}."
        )
    return "."
