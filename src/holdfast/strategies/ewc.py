"""Elastic weight consolidation (Kirkpatrick et al. 2017): Fisher importance with a quadratic penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle, Penalty
from holdfast.hold.attach import together
from holdfast.hold.cost import Estimate, prior_costs
from holdfast.hold.reference import weights_of
from holdfast.importance import ImportancePrior
from holdfast.importance.fisher import FisherOptions
from holdfast.records import ProtectionSummary
from holdfast.strategies.protocol import Context, Stage, Strategy, register
from holdfast.tasks.task import TaskStream


class EwcOptions(Options):
    """Strength of the penalty, size of the Fisher estimate, and how tasks add up."""

    name: Literal["ewc"] = "ewc"
    strength: float = Field(3e3, gt=0, description="lambda of the penalty")
    fisher: FisherOptions = Field(default_factory=FisherOptions)
    variant: Literal["sum", "online", "separate"] = Field(
        "sum", description="one penalty of the summed Fisher; of a decaying sum; one penalty a task"
    )
    gamma: float | None = Field(
        None, gt=0, le=1, description="online only: share of the old Fisher that is kept (default 0.95)"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> EwcOptions:
        if self.gamma is not None and self.variant != "online":
            raise ValueError(f"`gamma` applies to `variant: online` only, not to `{self.variant}`")
        return self


@register
class Ewc(Strategy):
    """The penalty lambda / 2 * sum_k sum F_k (theta - theta*_k)^2 (eq. 3), F_k per sample, after task k.

    ``sum`` and ``online`` have one anchor, the weights that the task starts from (Huszar 2018), and one F:
    F <- F + F_k, or F <- gamma F + F_k (Schwarz et al. 2018, arXiv 1805.06370, eq. 9; its further factor
    gamma on the penalty is a part of lambda here). ``separate`` keeps F_k and theta*_k of each task k, as the
    original does: 2 values a weight more with every task, in memory and state; the others keep 1 in all.
    F is of the true answers, and never the square of a batch's gradient. The papers search lambda and gamma.
    """

    name = "ewc"
    paper = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    summary = "quadratic penalty on leaving the old weights, scaled by Fisher information"
    Options = EwcOptions
    sharded = True
    state = "constant"
    ends_untrained = True

    def __init__(self, options: EwcOptions) -> None:
        super().__init__(options)
        self.fishers: list[ImportancePrior] = []  # one, unless `separate`
        self.anchors: list[dict[str, Tensor]] = []  # theta*_k; `separate` only
        self._penalties: list[Penalty] = []

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """A Fisher and a penalty; with `separate`, in the last task, of each task before it."""
        kept = max(len(stream) - 1, 1) if self.options.variant == "separate" else 1
        return Estimate(prior_costs(model, self.options.fisher, kept))

    def begin(self, context: Context, stage: Stage) -> None:
        """One penalty around each task's own weights, or one around those that this stage starts from."""
        anchors = self.anchors or [weights_of(context.model, fisher.tensors) for fisher in self.fishers]
        pairs = zip(self.fishers, anchors, strict=True)
        self._penalties = [Penalty(f, strength=self.options.strength, reference=a) for f, a in pairs]

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Add the penalties' gradients once per optimizer step."""
        with together() as handles:
            for penalty in self._penalties:
                handles.append(penalty.attach(model, optimizer))
        return handles

    def end(self, context: Context, stage: Stage) -> None:
        """Estimate this task's Fisher, and add it to the others or put it beside them."""
        if self._penalties:
            total = self.fishers[0].merge(self.fishers[1:], how="sum")  # the stiffness of all together
            ProtectionSummary(
                **Penalty(total, strength=self.options.strength).summary(),
                mechanism={"name": "penalty", "strength": self.options.strength},
            ).write(context.folder / "protection.json")
        self._penalties = []
        (task,) = stage.tasks
        fisher = context.importance(task, self.options.fisher)
        if self.options.variant == "separate":
            self.fishers.append(fisher)
            anchor = weights_of(context.model, fisher.tensors)
            self.anchors.append({n: t.cpu() for n, t in anchor.items()})
            return
        for old in self.fishers:
            kept = (self.options.gamma or 0.95) if self.options.variant == "online" else 1.0
            decayed = ImportancePrior({n: t * kept for n, t in old.tensors.items()}, old.meta)
            fisher = decayed.merge(fisher, how="sum")
        self.fishers = [fisher]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The one Fisher, or all Fishers and anchors."""
        if self.options.variant != "separate":
            return next(((dict(f.tensors), dict(f.meta)) for f in self.fishers), ({}, {}))
        tensors = {f"{k}:fisher:{n}": t for k, f in enumerate(self.fishers) for n, t in f.tensors.items()}
        tensors |= {f"{k}:anchor:{n}": t for k, a in enumerate(self.anchors) for n, t in a.items()}
        return tensors, {"tasks": [dict(fisher.meta) for fisher in self.fishers]}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        if self.options.variant != "separate":
            self.fishers = [ImportancePrior(dict(tensors), dict(values))] if tensors else []
            return

        def part(start: str) -> dict[str, Tensor]:
            return {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}

        self.fishers = [ImportancePrior(part(f"{k}:fisher:"), dict(m)) for k, m in enumerate(values["tasks"])]
        self.anchors = [part(f"{k}:anchor:") for k in range(len(self.fishers))]
