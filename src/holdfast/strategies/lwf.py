"""Learning without forgetting: distillation from the model before the task (Li & Hoiem 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.config import Options
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.models import accepts, evaluating, is_encoder_decoder
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream
from holdfast.training.verbs import model_inputs


def distillation(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Mean over N positions of KL(softmax(teacher / T) || softmax(student / T)), a scalar.

    Its gradient is that of LwF's eq. 2, the cross-entropy of the same distributions: they differ by the
    teacher's entropy, so this one is zero where student and teacher agree. No factor T² (Hinton et al.).
    """
    student, teacher = (F.log_softmax(z.float() / temperature, -1) for z in (student_NV, teacher_NV))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / max(len(student), 1)


class Teacher:
    """The model as it is now, kept while it goes on learning.

    Only trained weights are copied, and put into the same modules for a forward pass: with LoRA the teacher
    is a second set of adapters, never a second backbone. Memory: one copy of the trained weights, and the
    logits of one micro-batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def logits(self, model: nn.Module, batch: Mapping[str, Any], length: int) -> Tensor:
        """The teacher's logits (B, length, V) at the last positions of a batch, without dropout."""
        inputs = model_inputs(batch)
        if not is_encoder_decoder(model):
            inputs.pop("labels")
            inputs["use_cache"] = False
            if accepts(model, "logits_to_keep"):
                inputs["logits_to_keep"] = length
        with evaluating(model):
            result: Tensor = torch.func.functional_call(model, self.weights, (), inputs).logits
        return result[:, -length:]

    def penalty(
        self, model: nn.Module, batch: Mapping[str, Any], logits: Tensor, temperature: float
    ) -> Tensor:
        """`distillation` from the teacher at the positions that predict answer tokens.

        Parameters
        ----------
        logits : Tensor
            The student's, (B, L, V) of the batch's last L positions; the gradient goes through them alone.
        """
        teacher, labels = self.logits(model, batch, logits.shape[1]), batch["labels"][:, -logits.shape[1] :]
        if not is_encoder_decoder(model):  # position i predicts token i + 1
            logits, teacher, labels = logits[:, :-1], teacher[:, :-1], labels[:, 1:]
        answer = labels != -100
        return distillation(logits[answer], teacher[answer], temperature)


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
