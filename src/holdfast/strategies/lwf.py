"""Learning without forgetting: distillation from the model before the task (Li & Hoiem 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream
from holdfast.training.teacher import Teacher


class LwfOptions(Options):
    """How soft, and how strong."""

    name: Literal["lwf"] = "lwf"
    temperature: float = Field(2.0, gt=0, description="T of eqs. 2 and 3")
    weight: float = Field(1.0, gt=0, description="lambda_o, beside a task loss of weight 1")


@register
class Lwf(Strategy):
    """Loss + weight KL(teacher || student) on the NEW task's inputs, from the second task on (eqs. 2 and 3).

    The teacher is the model as it was before the task, with T = 2 and lambda_o = 1 (the paper's). A language
    model has one head, so the old tasks' outputs are its next-token distributions at the answer's positions
    (the true answer given); the mean over these tokens is taken in each micro-batch. No warm-up of a head.
    The teacher needs a forward pass more for each micro-batch and one copy of the trained weights (with LoRA:
    of the adapters); it is made from the weights that a stage starts from. Extra state: none.
    """

    name = "lwf"
    paper = "Li & Hoiem 2016, arXiv 1606.09282"
    summary = "on the new inputs, stays close to the answers of the model before the task"
    Options = LwfOptions
    reads = ("input_ids", "labels")
    ends_untrained = True

    def __init__(self, options: LwfOptions) -> None:
        super().__init__(options)
        self.teacher: Teacher | None = None

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The teacher, from the second task on."""
        return Estimate([Cost("teacher (the trained weights before the task)", trained_bytes(model))])

    def begin(self, context: Context, stage: Stage) -> None:
        """Keep the model as it is; before the first task there is nothing to keep."""
        self.teacher = None if stage.first else Teacher(context.model)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With distillation at the answer's positions."""
        if self.teacher is None:
            return loss
        options = self.options
        away = self.teacher.penalty(model, batch, outputs.logits, options.temperature)
        return loss + options.weight * away

    def end(self, context: Context, stage: Stage) -> None:
        """Free the teacher."""
        self.teacher = None
