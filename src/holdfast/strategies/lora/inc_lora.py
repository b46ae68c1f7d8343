"""IncLoRA: a new LoRA for each task, all of them summed (the baseline of Wang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.hold.cost import Estimate
from holdfast.models.adapters import check_growable
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.lora.grown import Grown, grown_cost
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class IncLoraOptions(Options):
    """Nothing to choose: rank, alpha and dropout of each task's LoRA are those of ``model.lora``."""

    name: Literal["inc-lora"] = "inc-lora"


@register
class IncLora(Strategy):
    """W + alpha/r sum_i B_i A_i, where task t trains A_t and B_t alone and those of tasks i < t stay.

    A_t starts as PEFT starts a LoRA, B_t at zero. The paper's settings are r = 8 and alpha = 32, as in
    `o-lora`, of which this is the case without a penalty. All LoRAs stand in one adapter of rank t r, A
    stacked by rows and B by columns, with alpha grown alike: it is a standard one, and the model needs no
    task identity. Dropout is therefore drawn once for all of a layer's LoRAs (so it is in the authors' code).
    An adapter given as ``model.path`` is what the first task trains, and later blocks have its rank.
    Extra state: r more ranks with each task. ``adapters.json`` of each task says how many there are.
    """

    name = "inc-lora"
    paper = "Wang et al. 2023, arXiv 2310.14152 (a baseline there)"
    summary = "a new LoRA for each task beside the frozen ones of earlier tasks, all summed"
    Options = IncLoraOptions
    sharded = True
    state = "per task"
    inference = "per task"

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter."""
        check_growable(model, self.name)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Of the ranks that later tasks add."""
        return Estimate([grown_cost(model, len(stream) - 1)])

    def begin(self, context: Context, stage: Stage) -> None:
        """Append the task's LoRA."""
        self.grown = Grown.for_task(context.model, stage.index, context.seed)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Freeze the earlier ones."""
        return [self.grown.attach(model, optimizer)]

    def end(self, context: Context, stage: Stage) -> None:
        """Record the rank."""
        self.grown.summary().write(context.folder / "adapters.json")
