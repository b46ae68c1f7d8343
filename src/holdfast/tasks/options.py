"""What every source of tasks has in common: order, number of rows, metric."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from holdfast.config import Options, half_character
from holdfast.tasks.problems import Problems
from holdfast.tasks.task import Example, MetricName, Task


def _is_text(value: Any) -> Any:
    if isinstance(value, bool | int | float):  # YAML reads 1.50 as 1.5 and TRUE as True: too late to repair
        raise ValueError(f"YAML read this name as {value!r}; write it in quotes, such as '73' or 'true'")
    return value


Name = Annotated[str, BeforeValidator(_is_text)]


def fault_of(options: Sequence[str]) -> str | None:
    """What is wrong with a list of allowed answers, if anything."""
    for index, text in enumerate(options):
        if not text.strip():
            return f"answer {index + 1} is empty; there must be something to tell it from the others"
        if half := half_character(text):
            return f"answer {index + 1} has {half} in it"
        if text in options[:index]:
            return f"the answer '{text}' stands in it twice"
    return None


def _distinct(options: tuple[str, ...]) -> tuple[str, ...]:
    if fault := fault_of(options):
        raise ValueError(fault)
    return options


class SourceOptions(Options):
    """Options of every source.

    A source adds two methods: `available`, the names of its tasks, and `read`, one task with all its rows.
    Both note what is wrong in `problems` instead of raising, so that everything is found in one go.
    """

    order: tuple[Name, ...] | Name | None = Field(
        default=None,
        description="task names, or a named order (`holdfast list orders`); all tasks when omitted. A task "
        "may come again: the second time it is called 'NAME (2)', with the same rows",
    )
    train_rows: int | None = Field(default=None, ge=1, description="at most that many training rows a task")
    test_rows: int | None = Field(default=None, ge=1, description="at most that many test rows a task")
    test_split: Literal["test", "validation"] = Field(
        default="test",
        description="validation: test on training data that `train_rows` leaves out, so that options can be "
        "chosen without looking at a test row; the test data aren't even read",
    )
    seed: int | None = Field(default=None, description="draws the rows; the run's seed when omitted")
    bad_rows: Literal["error", "skip"] = Field(
        default="error", description="error: a malformed or empty row stops everything; skip: it is left out"
    )
    metric: MetricName | dict[str, MetricName] | None = Field(
        default=None,
        description="one metric for all tasks, or task name to metric; exact_match when omitted (of "
        "running text: perplexity)",
    )
    options: dict[str, Annotated[tuple[Name, ...], AfterValidator(_distinct)]] = Field(
        default_factory=dict, description="task name to its allowed answers, for the metric `options`"
    )

    makes_validation: ClassVar[bool] = False  # `read` itself gives validation rows in place of test rows

    def title(self) -> str:
        """What the stream is called where no named order is used."""
        return str(getattr(self, "source", "tasks"))

    def available(self, problems: Problems) -> list[str]:
        """Names of the tasks this source has, in its default order."""
        raise NotImplementedError

    def read(self, name: str, problems: Problems, seed: int) -> Task | None:
        """One task with all its rows, or None where nothing can be read."""
        raise NotImplementedError


def subsample(rows: Sequence[Example], limit: int | None, seed: int, *stream: str) -> Sequence[Example]:
    """At most `limit` rows, drawn by seed and task, in their original order.

    The draw depends on nothing but `seed`, `stream` (task name and split) and the number of rows, so neither
    the other tasks nor the order change it, and the rows of a smaller limit are among those of a larger one.
    Rows of one chat (`Example.chat`) are drawn one behind another: at most one chat is drawn in part.
    """
    return [rows[i] for i in sorted(_drawn(rows, limit, seed, stream)[0])]


def left_out(rows: Sequence[Example], limit: int | None, seed: int, *stream: str) -> list[Example]:
    """The rows that `subsample` leaves out when called with the same arguments, in their original order.

    A row whose prompt stands among the drawn rows too is dropped, and one of a chat that does: data sets
    repeat themselves, and what was trained on would measure memory.
    """
    drawn, rest = _drawn(rows, limit, seed, stream)
    known, chats = {_key(rows[i]) for i in drawn}, {rows[i].chat for i in drawn} - {""}
    return [rows[i] for i in sorted(rest) if _key(rows[i]) not in known and rows[i].chat not in chats]


def met_in_training(tested: Iterable[Task], task: Task) -> dict[str, int]:
    """How many test rows of which tasks ask what is asked in rows that `task` is learned from.

    A task that is another once more (`Task.same_as`) tells nothing new.
    """
    seen = {_key(row) for row in task.train} if not task.same_as else set()
    met = {t.name: 0 if t.same_as else sum(_key(row) in seen for row in t.test) for t in tested}
    return {name: count for name, count in met.items() if count}


def trained_on(tested: Iterable[Task], task: Task) -> Iterator[str]:
    """What `met_in_training` counts, in a line each."""
    tests = {known.name: known for known in tested}
    for name, met in met_in_training(tests.values(), task).items():
        yield (
            f"{name}: {met} of {len(tests[name].test)} test rows ask what is asked in the rows of "
            f"'{task.name}' that are trained on; of those the score tells what was seen, and not what is "
            "kept."
        )


def _drawn(
    rows: Sequence[Example], limit: int | None, seed: int, stream: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Positions that are drawn, and the others."""
    if limit is None or limit >= len(rows):
        return list(range(len(rows))), []
    chats: dict[str | int, list[int]] = {}
    for position, row in enumerate(rows):
        chats.setdefault(row.chat or position, []).append(position)
    together, count = list(chats.values()), len(chats)
    digest = hashlib.sha256("/".join([str(seed), *stream]).encode()).digest()
    order = random.Random(int.from_bytes(digest[:8])).sample(range(count), count)
    shuffled = [position for number in order for position in together[number]]
    return shuffled[:limit], shuffled[limit:]


def _key(row: Example) -> str:
    if row.raw:
        return row.completion
    return row.prompt if isinstance(row.prompt, str) else repr(row.prompt)  # chat messages can't be hashed
