"""No training at all: what the model knew before, the floor of every table."""

from __future__ import annotations

from typing import Literal

from torch import nn

from holdfast.config import Options
from holdfast.hold.cost import Estimate
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class BaseOptions(Options):
    """Nothing to choose."""

    name: Literal["base"] = "base"


@register
class Base(Strategy):
    """Every stage leaves the model as it is: no step is made, whatever the run's training options say.

    All rows of its matrix are those of the model before the first task, so BWT is 0. AP is what a method must
    be above to have taught anything, and learning accuracy what is owed to the model alone. With LoRA the
    adapter stays as PEFT starts it, which adds nothing.
    """

    name = "base"
    paper = "the usual floor"
    summary = "nothing is trained: the model as it was, the floor of every table"
    Options = BaseOptions
    sharded = True
    trains = False

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Nothing is trained."""
        return Estimate(trained=0)

    def begin(self, context: Context, stage: Stage) -> None:
        """Freeze everything, so that a training loop of somebody's own can't train it either."""
        context.model.requires_grad_(False)
