"""InfLoRA: a new LoRA for each task that does not see what earlier tasks' inputs span (Liang & Li 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.hold.cost import Estimate
from holdfast.importance.seeding import sample
from holdfast.models.adapters import check_growable, lora_factors, lora_layers
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.lora.grown import Grown, grown_cost
from holdfast.strategies.lora.inputs import (
    ROUNDING,
    beside,
    extended,
    held_share,
    input_moments,
    leading,
    moments_cost,
)
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class InfLoraOptions(Options):
    """How much of the old inputs is held, and from how many rows they are known."""

    name: Literal["inf-lora"] = "inf-lora"
    energy: float = Field(0.98, gt=0, le=1, description="share of the inputs' energy that a task has held")
    samples: int = Field(256, ge=1, description="rows whose inputs are looked at, drawn by the run's seed")


def designed(moment_DD: Tensor, held_DD: Tensor | None, rank: int) -> Tensor:
    """A_t (rank, D): the leading directions of the new inputs without the held ones, each of norm 1 / √3.

    Where fewer are left, the other rows are zero: those ranks learn nothing.
    """
    values_D, rows_DD = leading(beside(moment_DD, held_DD))
    rows_RD = rows_DD[:rank] / math.sqrt(3)
    return rows_RD * (values_D[:rank] > ROUNDING * moment_DD.double().trace())[:, None]


@register
class InfLora(Strategy):
    """`inc-lora` with A_t fixed before task t, orthogonal to the inputs of tasks i < t; only B_t is trained.

    With H the new task's inputs of a layer (prompts and answers, through the model before training) and M the
    projector on the held directions: A_t = the first r left singular vectors of (I - M) H, so that a change
    B_t A_t lies in the span of the new inputs and does nothing to held ones (the paper's section 3; its B is
    PEFT's A). Rows of norm 1 / √3 as in the authors' code, which is what PEFT starts A with. After the task,
    by GPM's rule, M gets the fewest leading directions of the inputs, now of the trained model, that bring
    what it holds of ‖H‖² to `energy`.

    The authors' threshold grows with the task up to a second value, where tasks are counted beforehand; ours
    is constant, so that nobody need count. Their code squares the singular values of H Hᵀ, fourth powers of
    inputs; ours are energies of H, as GPM writes them: the same threshold holds more here. They keep M or its
    complement, whichever is smaller (DualGPM); a projector is the same M. Their configs: r 10, 0.98
    (ImageNet-R; CIFAR-100: 0.95) growing to 1, Adam at 5e-4. A ViT there, keys and values; here what
    ``model.lora`` adapts. Once M holds all that a task brings, the task can't be learned.

    Extra state: a square matrix for each adapted layer, as wide as its input, and r more ranks a task.
    ``adapters.json`` of each task says what share of all input directions is held.
    """

    name = "inf-lora"
    paper = "Liang & Li 2024, arXiv 2404.00228"
    summary = "a new LoRA for each task that reads only directions which earlier inputs do not use"
    Options = InfLoraOptions
    state = "per task"
    inference = "per task"
    ends_untrained = True

    def __init__(self, options: InfLoraOptions) -> None:
        super().__init__(options)
        self.held: dict[str, Tensor] = {}  # M by adapted layer

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter."""
        check_growable(model, self.name)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Of the ranks that later tasks add, the moments and the projectors; B alone is trained."""
        trained = sum(b.numel() for _, b in lora_factors(model))
        return Estimate([grown_cost(model, len(stream) - 1), moments_cost(model)], trained)

    def _moments(self, context: Context, stage: Stage) -> dict[str, Tensor]:
        rows = sample(super().examples(context, stage), self.options.samples, context.seed)
        return input_moments(context.model, context.encoder.many(rows), context.tokenizer.pad_token_id)

    def begin(self, context: Context, stage: Stage) -> None:
        """Append the task's LoRA and design its A."""
        self.grown = Grown.for_task(context.model, stage.index, context.seed)
        moments = self._moments(context, stage)
        with torch.no_grad():
            for name, new in zip(lora_layers(context.model), self.grown.new_a(), strict=True):
                new.copy_(designed(moments[name], self.held.get(name), len(new)))
        for a, _ in self.grown.factors:
            a.requires_grad_(False)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Freeze the earlier ones."""
        return [self.grown.attach(model, optimizer)]

    def end(self, context: Context, stage: Stage) -> None:
        """Hold the directions of this task's inputs too."""
        for name, moment in self._moments(context, stage).items():
            self.held[name] = extended(self.held.get(name), moment, self.options.energy)
        summary = self.grown.summary().model_copy(update={"held": held_share(self.held)})
        summary.write(context.folder / "adapters.json")

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The projectors."""
        return dict(self.held), {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.held = dict(tensors)
