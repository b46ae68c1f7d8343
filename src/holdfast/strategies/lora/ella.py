"""ELLA: a new LoRA for each task, kept off the entries that earlier ones changed much (Das Biswas et al.)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.hold.cost import Cost, Estimate
from holdfast.models.adapters import check_growable, lora_layers, scale_of
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.lora.grown import Grown, grown_cost
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class EllaOptions(Options):
    """How strongly a task is kept off what earlier ones changed."""

    name: Literal["ella"] = "ella"
    strength: float = Field(1e4, ge=0, description="lambda of the penalty")


@register
class Ella(Strategy):
    """`inc-lora` with the loss + lambda sum_ij (dW_t)_ij^2 (W_past)_ij^2, W_past = alpha/r sum_{i<t} B_i A_i.

    dW_t = alpha/r B_t A_t. The importance of an entry of a weight is thus the square of what earlier tasks
    together changed in it, (w - w_0)^2: no data, no gradient, and also a control for importances that take
    both. Entries that nothing changed are free, unlike under `o-lora`. From the abstract and reviews of the
    paper (the element-wise product of the new with the aggregated past update); its lambda was not found. It
    merges earlier LoRAs into one matrix; here they stay as frozen ranks of one adapter, whose product is that
    matrix, so nothing but ranks is kept. The term is in the loss, once per optimizer step. In training:
    W_past^2 of each adapted weight. Extra state: r more ranks a task.
    """

    name = "ella"
    paper = "Das Biswas et al. 2026, arXiv 2601.02232"
    summary = "a new LoRA for each task, penalised where the earlier ones together changed a weight"
    Options = EllaOptions
    looks = False
    state = "per task"
    inference = "per task"

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter."""
        check_growable(model, self.name)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Of the ranks that later tasks add, and of the penalty."""
        layers = lora_layers(model).values()
        count = sum(layer.in_features * layer.out_features for layer in layers)
        what = "penalty (squared past update, the new one, its gradient)"
        return Estimate([grown_cost(model, len(stream) - 1), Cost(what, 3 * 4 * count)])

    def begin(self, context: Context, stage: Stage) -> None:
        """Append the task's LoRA, and see what the earlier ones changed."""
        grown = self.grown = Grown.for_task(context.model, stage.index, context.seed)
        scales = [scale_of(layer) for layer in lora_layers(context.model).values()]
        self._scales, self._past = scales, []
        if grown.frozen and self.options.strength:
            parts = zip(scales, grown.old_b(), grown.old_a(), strict=True)
            self._past = [(s * b @ a).square() for s, b, a in parts]

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Freeze the earlier ones."""
        return [self.grown.attach(model, optimizer)]

    def overlap(self) -> Tensor:
        """The sum over layers and entries of the squared new update times the squared past one; a scalar."""
        parts = zip(self._scales, self.grown.new_b(), self.grown.new_a(), self._past, strict=True)
        return torch.stack([((s * b @ a).square() * past).sum() for s, b, a, past in parts]).sum()

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With the penalty, from the second task on."""
        return loss + self.options.strength * self.overlap() if self._past else loss

    def end(self, context: Context, stage: Stage) -> None:
        """Record the rank, and how much the new LoRA changes what was changed before."""
        with torch.no_grad():
            left = float(self.overlap()) if self._past else None if self.grown.frozen else 0.0
        self._past = []
        self.grown.summary(left).write(context.folder / "adapters.json")
