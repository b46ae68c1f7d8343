"""Replay memory: examples of earlier tasks, kept or written by the model, and how they are mixed in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from holdfast.config import Options
from holdfast.tasks.general import GeneralOptions, read_texts, with_texts
from holdfast.tasks.task import Example, Task, TaskStream


class WritingOptions(Options):
    """How the model writes rows of its own, and which of them are left out."""

    temperature: float = Field(1.0, gt=0, description="of the prompts; answers are always greedy")
    top_p: float = Field(
        0.95, gt=0, le=1, description="prompts are drawn from the likeliest tokens up to this"
    )
    top_k: int | None = Field(None, ge=1, description="and from so many of them at most")
    unsure: float | None = Field(
        None, lt=0, description="leave out rows whose answer has a lower mean log-probability a token"
    )
    cut: Literal["left out", "kept"] | None = Field(
        None,
        description="answers, and running texts, that don't end within their tokens. kept: without an end, "
        "so that none is learned there (default: left out; of the base's own rows kept, as most answers of a "
        "chat model are long)",
    )
    tries: int = Field(
        4, ge=1, description="write at most so many rows for each one asked for, where some are left out"
    )


class MemoryOptions(Options):
    """How many examples a memory has, and which; ``generated`` stands for ``{sampling: generated}``."""

    fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="balanced, surprise: share of each task's rows (default 0.02, K, section VI)",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="rows instead of a share: of each task (balanced, surprise, generated: 100) or in all "
        "(reservoir)",
    )
    sampling: Literal["balanced", "reservoir", "surprise", "generated", "none"] = Field(
        "balanced",
        description="balanced: a draw of each task by itself; reservoir: one buffer of fixed size, in which "
        "every row seen so far is equally likely; surprise: of each task the rows whose answers the model "
        "finds least likely once it has learned them; generated: no row is kept, the model writes its own; "
        "none: nothing is kept, for general text alone",
    )
    writing: WritingOptions | None = Field(None, description="generated only: how rows are written")

    @model_validator(mode="before")
    @classmethod
    def _by_sampling(cls, value: Any) -> Any:
        return {"sampling": value} if isinstance(value, str) else value

    @property
    def generated(self) -> bool:
        """Whether the model writes the rows itself."""
        return self.sampling == "generated"

    def size(self, rows: int) -> int:
        """Balanced and surprise only: how many of a task's rows are kept."""
        return min(self.count or max(1, round((self.fraction or 0.02) * rows)), rows)

    @property
    def written(self) -> int:
        """Generated only: rows of each task."""
        return self.count or 100

    @model_validator(mode="after")
    def _one_size(self) -> MemoryOptions:
        if self.generated and self.fraction is not None:
            raise ValueError(
                "`fraction` doesn't apply to `sampling: generated`; give `count`, rows of each task"
            )
        if not self.generated and self.writing is not None:
            raise ValueError("`writing` applies to `sampling: generated` only")
        for name in ("fraction", "count"):
            if self.sampling == "none" and getattr(self, name) is not None:
                raise ValueError(f"`{name}` doesn't apply to `sampling: none`, which keeps nothing")
        if self.fraction is not None and self.count is not None:
            raise ValueError("give one of `fraction` and `count`")
        if self.sampling == "reservoir" and self.count is None:
            raise ValueError("`sampling: reservoir` needs `count`, the size of the whole buffer")
        return self


def _keeps_rows(options: MemoryOptions) -> MemoryOptions:
    if options.sampling == "none":
        raise ValueError("`sampling: none` leaves nothing to replay; take `balanced`, or leave `memory` out")
    return options


RowsOptions = Annotated[MemoryOptions, AfterValidator(_keeps_rows)]  # where there is no general text


class RehearsalOptions(Options):
    """Train on a few examples of earlier tasks beside the new ones."""

    memory: MemoryOptions = Field(default_factory=MemoryOptions)
    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of a later task's training rows that are old (0.2; of generated ones 0.4)",
    )
    mixing: Literal["rows", "batches"] = Field(
        "rows",
        description="rows: old ones are shuffled among the new; batches: each batch of new rows gets its "
        "share of old ones beside it, drawn anew",
    )
    targets: Literal["text", "logits"] = Field(
        "text",
        description="what replayed answers are learned from. text: their tokens; logits: what the model "
        "before the task would put there, each token's probability (one copy more of the trained weights)",
    )
    general: GeneralOptions | None = Field(
        None, description="general text in a stated share of the rows, from the first task on"
    )

    @model_validator(mode="after")
    def _has_rows(self) -> RehearsalOptions:
        if self.memory.sampling != "none":
            return self
        of_rows = {"targets": self.targets == "logits", "mixing": self.mixing == "batches",
                   "ratio": self.ratio is not None}  # fmt: skip
        for name, given in of_rows.items():
            if given:
                value = getattr(self, name)
                raise ValueError(f"`{name}: {value}` is for replayed rows, and `sampling: none` keeps none")
        if self.general is None:
            raise ValueError("`sampling: none` without `general` leaves nothing to replay; give one of them")
        return self

    @property
    def share(self) -> float:
        """`ratio`, or what it is where nobody says."""
        return self.ratio or (0.4 if self.memory.generated else 0.2)


# of a task that it has just learned: rows that the model writes, or those that it finds most surprising
Write = Callable[[Task, MemoryOptions], Sequence[Example]]


def stand_in(task: Task, options: MemoryOptions) -> list[Example]:
    """In place of `Write` where only the number of rows counts."""
    return [Example("", "")] * (options.written if options.generated else options.size(len(task.train)))


def sizes_before(options: MemoryOptions, stream: TaskStream) -> list[int]:
    """How many examples a memory has when each task of a stream is learned."""
    memory, sizes = Memory(options), []
    for task in stream:
        sizes.append(len(memory))
        memory.add(task, 0, stand_in)
    return sizes


def mix(new: Sequence[Example], old: Sequence[Example], ratio: float, draw: random.Random) -> list[Example]:
    """New examples and old ones, of which `ratio` are old, in random order; old ones in whole rounds."""
    wanted = round(len(new) * ratio / (1 - ratio))
    taken: list[Example] = []
    while len(taken) < wanted:
        taken += draw.sample(old, min(len(old), wanted - len(taken)))
    mixed = [*new, *taken]
    draw.shuffle(mixed)
    return mixed


class Memory:
    """Examples for the tasks learned so far; it holds copies and never looks at an earlier task again.

    Parameters
    ----------
    options : MemoryOptions

    Attributes
    ----------
    tasks : int
        How many it has been given.
    """

    def __init__(self, options: MemoryOptions) -> None:
        self.options = options
        self.rows: list[tuple[str, Example]] = []
        self._seen = self.tasks = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def examples(self) -> list[Example]:
        """The examples alone, in the order they came in."""
        return [example for _, example in self.rows]

    def add(self, task: Task, seed: int, write: Write | None = None) -> None:
        """Take in a task that has just been learned; a run's seed leaves the same rows every time.

        Parameters
        ----------
        write : callable, optional
            Asks the model: a generated memory takes rows of its own, and none of the task's; one by surprise
            those of the task's that it names.
        """
        draw = random.Random(f"memory {seed} {self.tasks}")
        self.tasks += 1
        options = self.options
        if options.sampling == "none":
            return
        if options.generated or options.sampling == "surprise":
            if write is None:
                raise ValueError(f"a memory by `sampling: {options.sampling}` needs `write`")
            self.rows += [_copy(task, row) for row in write(task, options)]
            return
        rows = len(task.train)
        if options.sampling == "reservoir":
            self._fill(task, draw, options.count or 0)
            return
        kept = sorted(draw.sample(range(rows), options.size(rows)))
        self.rows += [_copy(task, task.train[i]) for i in kept]

    def _fill(self, task: Task, draw: random.Random, room: int) -> None:
        """Reservoir sampling (Vitter 1985): after n rows each is in the buffer with probability room / n."""
        for example in task.train:
            self._seen += 1
            if len(self.rows) < room:
                self.rows.append(_copy(task, example))
            elif (slot := draw.randrange(self._seen)) < room:
                self.rows[slot] = _copy(task, example)

    def mixed_with(self, new: Sequence[Example], ratio: float, seed: int) -> list[Example]:
        """New examples and old ones, of which `ratio` are old, in random order.

        The memory is gone through in whole rounds, so no row is replayed twice more often than another.
        """
        if not self.rows:
            return list(new)
        return mix(new, self.examples, ratio, random.Random(f"mix {seed} {self.tasks}"))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the examples themselves, and the counters."""
        rows = [{"task": task, **example.record()} for task, example in self.rows]
        return {"rows": rows, "seen": self._seen, "tasks": self.tasks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.rows = [(row["task"], Example.of_record(row)) for row in state["rows"]]
        self._seen, self.tasks = state["seen"], state["tasks"]


def _copy(task: Task, row: Example) -> tuple[str, Example]:
    """A row of the memory's own: a task that comes again has the very same rows, and those are new ones."""
    return task.name, replace(row)


class Rehearsal:
    """A memory and the ratio at which it is mixed into what later tasks train on.

    The strategy `replay` and the run config's ``replay:`` section are both this class. A task takes
    1 / (1 - ratio) times as many steps an epoch as without; with ``mixing: batches`` as many, in batches that
    are larger by as much. Memory: the kept examples, in the state too. The file of general text is read
    where its rows are first mixed in, or by `check`.
    """

    def __init__(self, options: RehearsalOptions) -> None:
        self.ratio, self.memory, self.mixing = options.share, Memory(options.memory), options.mixing
        self.general, self.targets = options.general, options.targets

    def check(self) -> None:
        """See that the file of general text, if there is one, can be read, before anything is trained.

        Raises
        ------
        DataError
        """
        if self.general is not None:
            _ = self._texts

    @cached_property
    def _texts(self) -> list[Example]:
        assert self.general is not None
        return read_texts(self.general.file)

    def mixed(self, new: Sequence[Example], seed: int) -> list[Example]:
        """What a stage trains on: its own rows, old ones once a task has been learned, and general text."""
        rows = list(new) if self.mixing == "batches" else self.memory.mixed_with(new, self.ratio, seed)
        if self.general is None:
            return rows
        return with_texts(rows, self._texts, self.general.share, f"general {seed} {self.memory.tasks}")

    def beside(self) -> list[Example]:
        """Old rows that each batch of new ones gets a share of."""
        return self.memory.examples if self.mixing == "batches" else []

    def replayed(self, rows: Sequence[Example]) -> list[int]:
        """Which of the rows that `mixed` gave come from the memory, which has its own copies."""
        old = {id(example) for example in self.memory.examples}
        return [number for number, row in enumerate(rows) if id(row) in old]

    def learned(self, tasks: Sequence[Task], seed: int, write: Write | None = None) -> None:
        """Take in the tasks of a stage that has just been trained; `write` as of `Memory.add`."""
        for task in tasks:
            self.memory.add(task, seed, write)
