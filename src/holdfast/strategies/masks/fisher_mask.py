"""Fisher mask: a task changes only the units that it needs most (FGGM, Tan et al. 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Gate, Handle
from holdfast.hold.cost import Estimate, prior_costs
from holdfast.importance import ImportancePrior
from holdfast.importance.fisher import FisherOptions
from holdfast.records import ProtectionSummary
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.masks.units import linear_maps, lowest
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class FisherMaskOptions(Options):
    """How much is held, and in what pieces."""

    name: Literal["fisher-mask"] = "fisher-mask"
    masked: float = Field(0.7, ge=0, lt=1, description="share of each tensor that the task may not change")
    unit: Literal["output", "weight"] = Field(
        "output", description="output: whole rows, by their mean Fisher; weight: each weight by itself"
    )
    fisher: FisherOptions = Field(default_factory=FisherOptions)

    @model_validator(mode="after")
    def _only_what_applies(self) -> FisherMaskOptions:
        if not self.masked:
            self.refuse_ignored(("unit", "fisher"), "with `masked: 0`, where nothing is held")
        return self


@register
class FisherMask(Strategy):
    """Before each task, the diagonal Fisher of that task; only what lies above its quantile is updated.

    M = 1 where F > Q(F), Q the `masked` quantile of each tensor (hence an adaptive threshold), F first
    averaged over a linear map's inputs, so that output units are kept whole. By reviews of the paper the
    threshold is a quantile, and a rate of 0.7 leaves the highest 30 % to be updated; that the quantile is
    taken in each tensor is our reading. It takes F from all training rows; here from ``fisher.samples``.

    Ours: the mask holds the step, not the gradient (the same under Adam without weight decay, and a held
    weight stays bit-identical with it); a tensor whose Fisher is zero throughout is not masked (LoRA's A,
    while B is zero). It acts from the first task on. What isn't a linear map in a block (norms, embeddings,
    head) is not masked. Extra state: none between tasks; during one, the gate's 2 values a weight.
    """

    name = "fisher-mask"
    paper = "Tan et al. 2026, arXiv 2601.18261"
    summary = "each task updates only the output units with its highest Fisher information"
    Options = FisherMaskOptions

    def check(self, model: nn.Module) -> None:
        """See that linear maps are trained."""
        linear_maps(model)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The task's Fisher and the gate."""
        return Estimate(prior_costs(model, self.options.fisher))

    def begin(self, context: Context, stage: Stage) -> None:
        """Make the mask from the weights that this stage starts from."""
        (task,) = stage.tasks
        fisher = context.importance(task, self.options.fisher)
        self._gate = Gate(ImportancePrior(self.held(context.model, fisher), dict(fisher.meta)))

    def held(self, model: nn.Module, fisher: ImportancePrior) -> dict[str, Tensor]:
        """Canonical name to 1 where a weight is held and 0 where it may move."""
        found: dict[str, Tensor] = {}
        for linear in linear_maps(model):
            for name in linear.parameters.keys() & fisher.tensors.keys():
                value = fisher.tensors[name]
                whole = self.options.unit == "output" and value.dim() == 2
                score = value.mean(1 - linear.out_dim) if whole else value
                held = (lowest(score, self.options.masked) & bool(score.any())).to(value)
                found[name] = linear.spread(held, value).expand_as(value).clone() if whole else held
        return found

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Hold from the first step on."""
        return [self._gate.attach(model, optimizer)]

    def end(self, context: Context, stage: Stage) -> None:
        """Record how much was held."""
        ProtectionSummary(
            **self._gate.summary(), mechanism={"name": "gate", "on": "update", "shape": "paper"}
        ).write(context.folder / "protection.json")
