"""Joint training on all tasks at once: the upper bound of continual learning."""

from __future__ import annotations

from typing import Literal

from holdfast.config import Options
from holdfast.strategies.protocol import Stage, Strategy, register
from holdfast.tasks.task import TaskStream


class MultitaskOptions(Options):
    """Nothing to choose."""

    name: Literal["multitask"] = "multitask"


@register
class Multitask(Strategy):
    """One stage with the examples of all tasks, shuffled together.

    There is no order, so FWT, BWT and learning accuracy are undefined; AP is what others are held against.
    """

    name = "multitask"
    paper = "the usual upper bound"
    summary = "all tasks at once: the upper bound, not a continual method"
    Options = MultitaskOptions
    sharded = True
    rehearsal_free = False
    open_ended = False

    def stages(self, stream: TaskStream) -> list[Stage]:
        """A single stage."""
        return [Stage("joint", stream.tasks, 0, 1)]
