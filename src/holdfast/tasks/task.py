"""What a task is: examples, a metric, and the name it goes by in a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.storage import text_lines

MetricName = Literal["exact_match", "rouge_l", "options", "choice", "edit_similarity", "sari", "perplexity"]
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
        The functions that the answer may call, as a chat template takes them.
    raw : bool
        Running text without a question: all of `completion` is learned behind the begin token, and no
        template frames it. The prompt is then empty.
    ended : bool
        Whether the answer ends where its text does. Of one that was cut no end is learned.
    chat : str
        The place of the chat of which it is one answer of several; "" of any other row.
    """

    prompt: str | tuple[Message, ...]
    completion: str
    references: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    # a task's digest is of the repr, and older than these
    raw: bool = field(default=False, repr=False)
    ended: bool = field(default=True, repr=False)
    chat: str = field(default="", repr=False, compare=False)

    @classmethod
    def text(cls, text: str, ended: bool = True) -> Example:
        """A row of running text."""
        return cls("", text, raw=True, ended=ended)

    @classmethod
    def of_lines(cls, text: str) -> list[Example]:
        """The examples of a JSONL file of what `record` gave."""
        return [cls.of_record(json.loads(line)) for line in text_lines(text) if line]

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer that counts as right."""
        return self.references or (self.completion,)

    def record(self) -> dict[str, Any]:
        """The example as a row of a JSONL file."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        row = {"prompt": prompt, "completion": self.completion, "references": list(self.references)}
        row |= {"tools": [dict(tool) for tool in self.tools]} if self.tools else {}
        return row | ({"raw": True} if self.raw else {}) | ({} if self.ended else {"ended": False})

    @classmethod
    def of_record(cls, row: Mapping[str, Any]) -> Example:
        """The example that `record` gave."""
        prompt = row["prompt"] if isinstance(row["prompt"], str) else tuple(row["prompt"])
        tools, raw = tuple(row.get("tools", ())), bool(row.get("raw"))
        ended = bool(row.get("ended", True))
        return cls(prompt, row["completion"], tuple(row["references"]), tools, raw, ended)


@dataclass(frozen=True, slots=True)
class Task:
    """A named set of training and test examples with the metric that scores it.

    Attributes
    ----------
    metric : {"exact_match", "rouge_l", "options", "choice", "edit_similarity", "sari", "perplexity"}
        How a generated answer is scored; ``options`` picks the nearest of `options` first, and ``perplexity``
        generates nothing: the score is 100 / the perplexity of the true answers.
    options : tuple of str
        The allowed answers, for ``metric="options"``.
    read_as : str
        The form that its files were recognised to have; "" for prompt and completion.
    same_as : str
        Which task of its stream it is once more, under another name; "" where it comes the first time.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    metric: MetricName = "exact_match"
    options: tuple[str, ...] = ()
    read_as: str = ""
    same_as: str = ""


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
