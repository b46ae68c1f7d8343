"""Tasks from the Hugging Face hub, through the ``datasets`` library, or from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from holdfast.config import Options
from holdfast.places import local_path
from holdfast.tasks.files import FORMATS, Placed, is_saved, load_saved, read_rows, rows_of
from holdfast.tasks.jsonl import note_if_empty
from holdfast.tasks.options import Name, SourceOptions
from holdfast.tasks.problems import Problems, first_line
from holdfast.tasks.rows import STANDARD, Columns, to_examples
from holdfast.tasks.task import Example, Task


class HubTask(Options):
    """One data set: where it is, which splits are used, and which column holds what.

    A column of class labels is read as the labels' names.
    """

    path: str | dict[Literal["train", "test"], str] = Field(
        description="hub id, a local file, a folder of save_to_disk, or {train: file, test: file}"
    )
    config: str | None = Field(
        default=None, description="the data set's configuration, such as 'sst2' of 'glue'"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    train: str = Field(default="train", description="split to train on, such as 'train[:80%]'")
    test: str = Field(default="test", description="split to test on, such as 'validation' or 'train[80%:]'")
    columns: Columns = STANDARD

    @property
    def files(self) -> dict[str, str] | None:
        """The local files of each split; None where a hub id is given."""
        if isinstance(self.path, str):
            return {"train": self.path} if Path(self.path).suffix.lower() in FORMATS else None
        return {str(split): file for split, file in self.path.items()}

    @model_validator(mode="after")
    def _only_what_applies(self) -> HubTask:
        if self.files is not None:
            self.refuse_ignored(("config", "revision"), "to local files")
        elif is_saved(local_path(str(self.path))):
            self.refuse_ignored(("config", "revision"), "to a folder of save_to_disk")
        return self


class HubSource(SourceOptions):
    """A data set of the Hugging Face hub, or local json, csv or parquet files, for each task."""

    source: Literal["hub"] = "hub"
    tasks: dict[Name, HubTask] = Field(min_length=1, description="task name to data set")

    def available(self, problems: Problems) -> list[str]:
        return list(self.tasks)

    def read(self, name: str, problems: Problems, seed: int) -> Task | None:
        spec = self.tasks[name]
        train, form = _rows(name, spec, spec.train, problems)
        test = _rows(name, spec, spec.test, problems)[0] if self.test_split == "test" else []
        return Task(name, train, test, read_as=form)


def _rows(name: str, spec: HubTask, split: str, problems: Problems) -> tuple[list[Example], str]:
    source = spec.path if isinstance(spec.path, str) else name
    where = f"{source}[{split}]"
    files = spec.files
    if files is None:
        rows = _from_hub(name, spec, split, where, problems)
    else:
        rows = _from_files(name, files, split, spec, problems)
    if rows is None:
        return [], ""
    examples, form = to_examples(rows, problems, spec.columns)
    if rows or not problems.found:
        note_if_empty(examples, where if files is None else next(iter(files.values())), problems)
    return examples, form


def _from_files(
    name: str, files: dict[str, str], split: str, spec: HubTask, problems: Problems
) -> list[Placed] | None:
    """The part of local files that a split such as ``train[:80%]`` means."""
    from datasets import ReadInstruction

    where = f"tasks.tasks.{name}"
    suffixes = {Path(file).suffix.lower() for file in files.values()}
    missing = [file for file in files.values() if not local_path(file).is_file()]
    if missing:
        problems.add(f"{where}.path", f"no file '{missing[0]}' (looked in {Path().resolve()})")
        return None
    if len(suffixes) != 1 or not suffixes <= set(FORMATS):
        found = ", ".join(sorted(suffixes))
        problems.add(f"{where}.path", f"files must be of one kind of {', '.join(FORMATS)}, got {found}")
        return None
    wanted = {part.strip().split("[")[0] for part in split.split("+")}  # the other need not even be sound
    rows = {
        part: read_rows(local_path(file), problems) if part in wanted else [] for part, file in files.items()
    }
    try:
        lengths = {part: len(found) for part, found in rows.items()}
        pieces = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        said = first_line(error)
        problems.add(where, f"split '{split}' of '{spec.path}' can't be loaded: {said}{_advice(spec)}")
        return None
    return [row for piece in pieces for row in rows[piece.splitname][piece.from_ : piece.to]]


def _from_hub(name: str, spec: HubTask, split: str, place: str, problems: Problems) -> list[Placed] | None:
    """One split, or None where it can't be had: whatever ``datasets`` raises is a problem here."""
    from datasets import ReadInstruction, concatenate_datasets, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        if is_saved(root := local_path(str(spec.path))):
            parts = load_saved(root)
            pieces = ReadInstruction.from_spec(split).to_absolute({name: len(d) for name, d in parts.items()})
            dataset = concatenate_datasets([parts[p.splitname].select(range(p.from_, p.to)) for p in pieces])
        else:
            path = str(root) if root.is_dir() else spec.path
            dataset = load_dataset(path=path, name=spec.config, revision=spec.revision, split=split)
    except Exception as error:
        said = first_line(error.__cause__ or error)
        problems.add(f"tasks.tasks.{name}", f"split '{split}' of '{spec.path}' can't be loaded: {said}.")
        return None
    return list(rows_of(dataset, place))


def _advice(spec: HubTask) -> str:
    if isinstance(spec.path, str):
        return (
            ". A single file has the split 'train' only: use train: 'train[:80%]' and test: 'train[80%:]', "
            "or path: {train: FILE, test: FILE}."
        )
    return "."
