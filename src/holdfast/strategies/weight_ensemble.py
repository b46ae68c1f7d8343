"""Weight ensemble: one share of the old weights for the whole model (K, eq. 14 and Table V)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from holdfast.config import Options
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.hold.fusion import fuse
from holdfast.hold.reference import weights_of
from holdfast.importance.prior import trained_parameters
from holdfast.importance.skill_units import matrix_units
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class WeightEnsembleOptions(Options):
    """How much of the old weights stays."""

    name: Literal["weight-ensemble"] = "weight-ensemble"
    old_share: float = Field(0.5, ge=0, le=1, description="lambda of eq. 14")


@register
class WeightEnsemble(Strategy):
    """After each task but the first, the weights become lambda old + (1 - lambda) new (K, eq. 14)."""

    name = "weight-ensemble"
    paper = "K, eq. 14 (Marouf et al. 2023, arXiv 2312.08977)"
    summary = "after each task, the average of the weights before and after it"
    Options = WeightEnsembleOptions

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The old weights."""
        return Estimate([Cost("the weights before each task", trained_bytes(model))])

    def begin(self, context: Context, stage: Stage) -> None:
        """Keep the weights that the stage starts from."""
        self.before = weights_of(context.model, trained_parameters(context.model))

    def end(self, context: Context, stage: Stage) -> None:
        """Average; the first task has no model before it (Algorithm 2)."""
        if stage.first:
            return
        parameters = trained_parameters(context.model)
        units = matrix_units(parameters)
        fuse(units, parameters, self.before, torch.full((len(units),), self.options.old_share))
