"""FAPM: what a task changed most beside the weights themselves is taken back (Huang et al. 2025)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.hold.reference import weights_of
from holdfast.importance.prior import trained_parameters
from holdfast.models.adapters import is_adapted
from holdfast.records import Pruning
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.masks.units import lowest
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class FapmOptions(Options):
    """How much of a task's update goes."""

    name: Literal["fapm"] = "fapm"
    pruned: float = Field(0.9, ge=0, lt=1, description="share of each tensor's update that is taken back")


def scores(before: Tensor, change: Tensor) -> Tensor:
    """S = |dW| - mean|W| |dW| / |W|, of the shape of both; W before the task. A weight that is 0 has -inf."""
    exact = torch.promote_types(before.dtype, torch.float32)
    size, moved = before.to(exact).abs(), change.to(exact).abs()
    ratio = torch.where(size > 0, moved / size, torch.inf)
    return moved - size.mean() * ratio


@register
class Fapm(Strategy):
    """W <- W_before + dW of the entries with the largest S = |dW| - mean|W| |dW| / |W|, tensor by tensor.

    A large change of a weight is worth keeping, one that is large beside the weight itself is what forgets;
    mean|W|, of the tensor before, brings both to one scale. All but the best 1 - `pruned` are taken back,
    90 % in the paper, after training, which is plain. The paper prunes one fine-tuning against the
    pre-trained weights; here each task's update, against the weights that it started from. S is from a review
    of the paper. It is negative wherever |W| is below its mean, so small weights go first, however they
    moved, and 0 in a tensor of equal weights (fresh norms), all of which go back. LoRA is refused: there the
    weights before the first task are B = 0. Extra state: none; during a task a copy of the trained weights.
    """

    name = "fapm"
    paper = "Huang et al. 2025, arXiv 2509.08255"
    summary = "after each task, takes back the part of its update that is large beside the weights"
    Options = FapmOptions

    def check(self, model: nn.Module) -> None:
        """See that whole weights are trained."""
        if is_adapted(model):
            raise ConfigError(
                "strategy.name: 'fapm' compares a weight's change with the weight, and LoRA's B is zero at "
                "first: leave out model.lora."
            )

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The weights before the task."""
        return Estimate([Cost("the weights before each task", trained_bytes(model))])

    def begin(self, context: Context, stage: Stage) -> None:
        """Keep the weights that the stage starts from."""
        self.before = weights_of(context.model, trained_parameters(context.model))

    @torch.no_grad()
    def end(self, context: Context, stage: Stage) -> None:
        """Prune."""
        kept = total = 0.0
        for name, parameter in trained_parameters(context.model).items():
            before = self.before[name]
            change = parameter - before
            gone = lowest(scores(before, change), self.options.pruned)
            total += float(change.float().square().sum())
            kept += float(change.float().square()[~gone].sum())
            parameter.copy_(torch.where(gone, before, parameter))
        self.before = {}
        left = kept / total if total else 1.0
        Pruning(pruned=self.options.pruned, energy_left=left).write(context.folder / "pruning.json")
