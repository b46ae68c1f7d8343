"""What a task is: examples, a metric, and the name it goes by in a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MetricName = Literal["exact_match", "rouge_l", "options", "choice", "edit_similarity", "sari"]
Message = Mapping[str, Any]  # role and content, both texts; tool calls where there are any


@dataclass(frozen=True, slots=True)
class Example:
    """One row: what the model is given and what it must answer.

    Attributes
    ----------
    prompt : str or tuple of messages
        Text, or chat messages (``{"role", "content"}``) that go through the tokenizer's chat template.
    completion : str
        The answer that is trained on.
    references : tuple of str
        All answers that count as right; empty means the completion alone.
    tools : tuple of mappings
        The functions that a chat may call, as its chat template takes them.
    text : bool
        It is no question and answer: `completion` is a text that is learned whole, without a frame.
    """

    prompt: str | tuple[Message, ...]
    completion: str
    references: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: bool = False

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer that counts as right."""
        return self.references or (self.completion,)

    def record(self) -> dict[str, Any]:
        """The example as a row of a JSONL file."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        row = {"prompt": prompt, "completion": self.completion, "references": list(self.references)}
        if self.text:
            return row | {"text": True}
        return row | ({"tools": [dict(tool) for tool in self.tools]} if self.tools else {})

    @classmethod
    def of_record(cls, row: Mapping[str, Any]) -> Example:
        """The example that `record` gave."""
        prompt = row["prompt"] if isinstance(row["prompt"], str) else tuple(row["prompt"])
        tools, text = tuple(row.get("tools", ())), bool(row.get("text", False))
        return cls(prompt, row["completion"], tuple(row["references"]), tools, text)


@dataclass(frozen=True, slots=True)
class Task:
    """A named set of training and test examples with the metric that scores it.

    Attributes
    ----------
    metric : {"exact_match", "rouge_l", "options", "choice", "edit_similarity", "sari"}
        How a generated answer is scored; ``options`` picks the nearest of `options` first.
    options : tuple of str
        The allowed answers, for ``metric="options"``.
    read_as : str
        The form that its files were recognised to have; "" for prompt and completion.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    metric: MetricName = "exact_match"
    options: tuple[str, ...] = ()
    read_as: str = ""


@dataclass(frozen=True, slots=True)
class TaskStream:
    """Tasks in the order in which they are learned."""

    name: str
    tasks: tuple[Task, ...] = field(default_factory=tuple)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def names(self) -> list[str]:
        """The tasks' names, in order."""
        return [task.name for task in self.tasks]
