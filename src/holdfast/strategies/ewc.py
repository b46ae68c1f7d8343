"""Elastic weight consolidation (Kirkpatrick et al. 2017): Fisher importance with a quadratic penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.importance import ImportancePrior
from holdfast.importance.fisher import FisherOptions
from holdfast.protect import Handle, Penalty
from holdfast.protect.reference import weights_of
from holdfast.storage import write_json
from holdfast.strategies.protocol import Context, Stage, Strategy, register


class EwcOptions(Options):
    """Strength of the penalty and size of the Fisher estimate."""

    name: Literal["ewc"] = "ewc"
    strength: float = Field(1e5, gt=0, description="lambda of the penalty")
    fisher: FisherOptions = Field(default_factory=FisherOptions)


@register
class Ewc(Strategy):
    """EWC with one anchor: per-sample Fisher after each task, summed over tasks, around the latest weights.

    The penalty is lambda / 2 * sum F (theta - theta*)^2. Fisher is per sample (not the square of a batch
    gradient), taken after the task on the true answers.
    """

    name = "ewc"
    paper = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    summary = "quadratic penalty on leaving the old weights, scaled by Fisher information"
    Options = EwcOptions

    def __init__(self, options: EwcOptions) -> None:
        super().__init__(options)
        self.fisher: ImportancePrior | None = None
        self._penalty: Penalty | None = None

    def begin(self, context: Context, stage: Stage) -> None:
        """Anchor to the weights that this stage starts from."""
        self._penalty = None
        if self.fisher is not None:
            self._penalty = Penalty(
                self.fisher, strength=self.options.strength, reference=weights_of(context.model, self.fisher)
            )

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Add the penalty's gradient once per optimizer step."""
        return () if self._penalty is None else (self._penalty.attach(model, optimizer),)

    def end(self, context: Context, stage: Stage) -> None:
        """Estimate this task's Fisher and add it to the sum."""
        if self._penalty is not None:
            choice = {"mechanism": {"name": "penalty", "strength": self.options.strength}, "control": "none"}
            write_json(context.folder / "protection.json", {**self._penalty.summary(), **choice})
        self._penalty = None
        (task,) = stage.tasks
        fisher = context.importance(task, self.options.fisher)
        self.fisher = fisher if self.fisher is None else self.fisher.merge(fisher, how="sum")

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The summed Fisher."""
        return ({}, {}) if self.fisher is None else (dict(self.fisher.tensors), dict(self.fisher.meta))

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take the summed Fisher back."""
        if tensors:
            self.fisher = ImportancePrior(dict(tensors), dict(values))
