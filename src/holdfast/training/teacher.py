"""The model as it was before a task, whose answers are stayed close to while it learns (distillation)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.models import accepts, evaluating, is_encoder_decoder
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
            inputs.pop("labels", None)
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
