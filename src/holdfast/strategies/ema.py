"""EMA: a running average of the weights over all training steps (K, Table V)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.hold.attach import hook, unwrap
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.importance.prior import trained_parameters
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class EmaOptions(Options):
    """How slowly the average moves."""

    name: Literal["ema"] = "ema"
    decay: float = Field(0.99, ge=0, lt=1, description="share of the average kept at each optimizer step")


@register
class Ema(Strategy):
    """average <- decay average + (1 - decay) weights at every step; after a task the average is the model.

    It starts from the weights before the first task, so it is eq. 14 of K applied at each step. The paper
    names no decay.
    """

    name = "ema"
    paper = "K, Table V (Szegedy et al. 2016)"
    summary = "the model is the running average of the weights over all steps"
    Options = EmaOptions

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The average."""
        return Estimate([Cost("average of the weights (float32)", trained_bytes(model, each=4))])

    def begin(self, context: Context, stage: Stage) -> None:
        """Start the average at the present weights, which are the last task's average."""
        self.parameters = trained_parameters(context.model)
        # float32: a 16-bit average would not move by a hundredth of a small difference
        self.average = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Follow each step."""

        def follow() -> None:
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.float(), 1 - self.options.decay)

        return [hook(unwrap(optimizer), after=follow)]

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """The average so far."""
        return self.average

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the average back."""
        for name, value in tensors.items():
            self.average[name].copy_(value)

    @torch.no_grad()
    def end(self, context: Context, stage: Stage) -> None:
        """The average becomes the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])
