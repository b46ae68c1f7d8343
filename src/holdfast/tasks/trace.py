"""Tasks from a TRACE folder, in the layout in which the benchmark is published (Wang et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from holdfast.places import local_path
from holdfast.tasks.files import read_json
from holdfast.tasks.jsonl import note_if_empty
from holdfast.tasks.options import SourceOptions
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import Columns, to_example
from holdfast.tasks.task import Example, MetricName, Task

_ROWS = Columns(prompt="prompt", completion="answer")
# in the benchmark's order, each with the metric that the benchmark scores it by
METRICS: dict[str, MetricName] = {
    "C-STANCE": "exact_match",
    "FOMC": "exact_match",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "choice",
    "NumGLUE-cm": "exact_match",
    "NumGLUE-ds": "exact_match",
    "20Minuten": "sari",
}


class TraceSource(SourceOptions):
    """A TRACE folder: ``<root>/<task>/{train,eval,test}.json``, each a list of ``{"prompt", "answer"}``.

    All eight tasks in the benchmark's order, unless `order` says otherwise, with its metrics: accuracy, of
    ScienceQA by the letter in front of the explanation, ROUGE-L (MeetingBank), edit similarity (Py150) and
    SARI (20Minuten). With ``test_split: validation`` the rows of ``eval.json`` take the place of the test's.
    """

    source: Literal["trace"] = "trace"
    path: Path = Field(
        description="the folder above the tasks, such as TRACE-Benchmark/LLM-CL-Benchmark_5000"
    )

    makes_validation: ClassVar[bool] = True

    def title(self) -> str:
        return "TRACE"

    def available(self, problems: Problems) -> list[str]:
        root = local_path(self.path)
        if not root.is_dir():
            problems.add("tasks.path", f"no folder '{self.path}' (looked in {root.resolve()})")
            return []
        found = [name for name in METRICS if (root / name / "train.json").is_file()]
        if not found:
            problems.add(
                "tasks.path",
                f"'{self.path}' has none of TRACE's tasks ({', '.join(METRICS)}), each a folder with "
                "train.json, eval.json and test.json: give the folder above them",
            )
        elif self.order is None and len(found) < len(METRICS):
            missing = ", ".join(name for name in METRICS if name not in found)
            problems.add("tasks.path", f"'{self.path}' lacks {missing}; name those to learn in tasks.order")
        return found

    def read(self, name: str, problems: Problems, seed: int) -> Task | None:
        folder = local_path(self.path) / name
        tested = "test" if self.test_split == "test" else "eval"
        train, test = (self._rows(folder / f"{part}.json", problems) for part in ("train", tested))
        return Task(name, train, test, metric=METRICS[name])

    @staticmethod
    def _rows(path: Path, problems: Problems) -> list[Example]:
        before = len(problems)
        data = read_json(path, problems)
        if len(problems) > before:
            return []
        if not isinstance(data, list):
            problems.add(path, "must be a list of {prompt, answer}")
            return []
        found = (to_example(row, f"{path} row {i}", problems, _ROWS) for i, row in enumerate(data, start=1))
        examples = [example for example in found if example is not None]
        note_if_empty(examples, path, problems)
        return examples
