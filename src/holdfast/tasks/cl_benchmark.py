"""Tasks from a CL_Benchmark folder, the layout in which O-LoRA and SAPT publish their data.

``<root>/<group>/<dataset>/{train,dev,test}.json`` comes in two shapes:

* a list of ``{"sentence", "label"}`` with ``labels.json`` (the allowed answers) beside it, as in O-LoRA; the
  instruction of each group stands in a file of its own, or in the configuration;
* ``{"Definition": text or [text], "Instances": [{"input", "output": text or [texts]}]}``, as in SAPT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from holdfast.places import local_path
from holdfast.tasks.files import read_json
from holdfast.tasks.jsonl import note_if_empty, read_labels
from holdfast.tasks.options import SourceOptions
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import Columns, to_example
from holdfast.tasks.task import Example, Task

LABELLED = "{instruction}Option: {options}\n{input}\nAnswer:"
DEFINED = "{instruction}{input}\nOutput: "
SUPERNI = "Definition: {instruction}\nNow complete the following example -\nInput: {input}\nOutput: "


class ClBenchmarkSource(SourceOptions):
    """A CL_Benchmark folder.

    Where an instance has several outputs, the first is trained on and all count as right (SAPT draws one
    at random).
    """

    source: Literal["cl_benchmark"] = "cl_benchmark"
    path: Path = Field(description="the folder above the groups, such as CL_Benchmark")
    test_file: Literal["test", "dev"] = Field(default="test", description="which file is tested on")
    instructions: Path | dict[str, str] = Field(
        default_factory=dict,
        description="for data without Definition: group or data set to instruction, or O-LoRA's JSON file",
    )
    prompt: str | None = Field(
        default=None,
        description="text with {instruction}, {options} and {input}; by shape and group when omitted",
    )

    @field_validator("prompt")
    @classmethod
    def _has_input(cls, value: str | None) -> str | None:
        if value is not None and "{input}" not in value:
            raise ValueError(f"the text must contain {{input}}, got {value!r}")
        return value

    @model_validator(mode="after")
    def _only_what_applies(self) -> ClBenchmarkSource:
        if self.prompt is not None and "{instruction}" not in self.prompt:
            self.refuse_ignored(("instructions",), "in a `prompt` without {instruction}")
        return self

    def title(self) -> str:
        return self.path.name

    def available(self, problems: Problems) -> list[str]:
        return list(self._folders(problems))

    def _folders(self, problems: Problems) -> dict[str, Path]:
        """Task name to folder; a data set that two groups have is called group/dataset."""
        root = local_path(self.path)
        if not root.is_dir():
            problems.add("tasks.path", f"no folder '{self.path}' (looked in {root.resolve()})")
            return {}
        folders = sorted(file.parent for file in root.glob("*/*/train.json"))
        folders = folders or sorted(file.parent for file in root.glob("*/train.json"))  # a group was given
        if not folders:
            problems.add("tasks.path", f"'{self.path}' has no <group>/<dataset>/train.json below it")
        count = Counter(folder.name for folder in folders)
        return {f.name if count[f.name] == 1 else f"{f.parent.name}/{f.name}": f for f in folders}

    def read(self, name: str, problems: Problems, seed: int) -> Task | None:
        folder = self._folders(Problems())[name]
        labels = read_labels(folder / "labels.json", problems)
        train = self._rows(folder / "train.json", labels, problems)
        tested = self.test_split == "test"
        test = self._rows(folder / f"{self.test_file}.json", labels, problems) if tested else []
        return Task(name, train, test, options=labels)

    def _rows(self, path: Path, labels: tuple[str, ...], problems: Problems) -> list[Example]:
        before = len(problems)
        data = read_json(path, problems)
        if len(problems) > before:
            return []
        if isinstance(data, list):
            return self._labelled(path, data, labels, problems)
        if isinstance(data, Mapping) and "Definition" in data and isinstance(data.get("Instances"), list):
            return self._defined(path, data, labels, problems)
        problems.add(
            path, "must be a list of {sentence, label}, or an object with 'Definition' and 'Instances'"
        )
        return []

    def _labelled(
        self, path: Path, data: list[Any], labels: tuple[str, ...], problems: Problems
    ) -> list[Example]:
        instruction = self._instruction(path, problems)
        return self._examples(
            path, data, self.prompt or LABELLED, ("sentence", "label"), instruction, labels, problems
        )

    def _defined(
        self, path: Path, data: Mapping[str, Any], labels: tuple[str, ...], problems: Problems
    ) -> list[Example]:
        definition, name = data["Definition"], path.parent.name
        # said of a group of data sets, it is for those without
        if isinstance(self.instructions, dict) and name in self.instructions:
            problems.add(
                "tasks.instructions",
                f"'{name}' does nothing to {path}, which has a Definition of its own; leave it out",
            )
        if isinstance(definition, list):
            definition = definition[0] if definition else ""
        if not isinstance(definition, str):
            problems.add(path, f"'Definition' must be a text or a list of texts, got {definition!r:.40}")
            return []
        instruction = definition.strip() + "\n" if definition.strip() else ""
        frame = self.prompt or (SUPERNI if path.parent.parent.name.lower() == "superni" else DEFINED)
        return self._examples(
            path, data["Instances"], frame, ("input", "output"), instruction, labels, problems
        )

    def _examples(
        self,
        path: Path,
        rows: list[Any],
        frame: str,
        keys: tuple[str, str],
        instruction: str,
        labels: tuple[str, ...],
        problems: Problems,
    ) -> list[Example]:
        columns, examples = Columns(prompt=keys[0], completion=keys[1]), []
        for number, row in enumerate(rows, start=1):
            answers = row.get(keys[1]) if isinstance(row, Mapping) else None
            if isinstance(answers, list) and answers:
                row = {**row, keys[1]: answers[0], "references": answers if len(answers) > 1 else None}
            example = to_example(row, f"{path} instance {number}", problems, columns)
            if example is not None:
                filled = _fill(
                    frame, instruction=instruction, options=", ".join(labels), input=str(example.prompt)
                )
                examples.append(Example(filled, example.completion, example.references))
        note_if_empty(examples, path, problems)
        return examples

    def _instruction(self, path: Path, problems: Problems) -> str:
        """The instruction for a data set: its own, or its group's."""
        known = (
            self.instructions
            if isinstance(self.instructions, dict)
            else _read_instructions(self.instructions, problems)
        )
        dataset, group = path.parent.name, path.parent.parent.name
        if known and dataset not in known and group not in known:
            problems.add(
                "tasks.instructions",
                f"none for '{dataset}' nor its group '{group}'; given: {', '.join(known)}",
            )
        return known.get(dataset, known.get(group, ""))


def _fill(frame: str, **values: str) -> str:
    """Put the values in place in one pass, so that braces in a text mean nothing."""
    return re.sub(r"\{(instruction|options|input)\}", lambda match: values[match.group(1)], frame)


def _read_instructions(path: Path, problems: Problems) -> dict[str, str]:
    """The first zero-shot instruction of each group: ``{group: [{"instruction_type", "instruction"}]}``."""
    before = len(problems)
    data = read_json(local_path(path), problems)
    if len(problems) > before:
        return {}
    try:
        return {
            group: next(item["instruction"] for item in items if item["instruction_type"] == "zero-shot")
            for group, items in data.items()
        }
    except (AttributeError, TypeError, KeyError, StopIteration):
        problems.add(
            "tasks.instructions",
            f"'{path}' must be JSON of the form "
            "{group: [{'instruction_type': 'zero-shot', 'instruction': text}]}",
        )
    return {}
