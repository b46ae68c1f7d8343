"""O-LoRA: a new LoRA for each task, in directions orthogonal to the earlier ones (Wang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.hold.cost import Estimate
from holdfast.models.adapters import check_growable
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.lora.grown import Grown, grown_cost
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class OLoraOptions(Options):
    """How strongly the new LoRA is kept orthogonal, and how small."""

    name: Literal["o-lora"] = "o-lora"
    orthogonality: float = Field(0.5, ge=0, description="lambda_1, of the overlap with earlier LoRAs")
    norm: float = Field(0.0, ge=0, description="lambda_2, of the norms of the new LoRA's factors")
    overlap: Literal["absolute", "squared"] = Field(
        "absolute", description="sum of the overlap's entries: absolute (authors' code) or squared (paper)"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> OLoraOptions:
        if self.orthogonality == 0:
            self.refuse_ignored(("overlap",), "with `orthogonality: 0`")
        return self


def overlap(old: Sequence[Tensor], new: Sequence[Tensor], kind: str = "absolute") -> Tensor:
    """Sum over layers and entries of |A_old A_newᵀ|, or of its square; a scalar.

    Parameters
    ----------
    old, new : sequence of Tensor
        A layer's earlier rows of A, (k, input), of all earlier tasks, and the new ones, (r, input).
    """
    inner = [before @ after.T for before, after in zip(old, new, strict=True)]
    return torch.stack([(i.abs() if kind == "absolute" else i.square()).sum() for i in inner]).sum()


@register
class OLora(Strategy):
    """`inc-lora` with the loss + lambda_1 sum_{i<t} |A_i A_tᵀ| + lambda_2 (‖A_t‖ + ‖B_t‖), over all layers.

    |.| is the sum of absolute entries, as in the authors' code; the paper writes the sum of squares
    (``overlap: squared``). The norms are Frobenius norms; they are in the code and in the paper's appendix.
    The paper's A spans the columns of A B, in PEFT's terms B; the code takes PEFT's A, and so do we. Settings
    there: r 8, alpha 32, dropout 0.1, on the queries and values of T5-large, AdamW at a constant 1e-3, one
    epoch, batches of 64, lambda_1 0.5 (5 for some tasks of the long stream), lambda_2 0. The penalty is
    added once per optimizer step; the code adds it for each micro-batch. It acts from the second task on, but
    for the norms. The LoRAs stand in one adapter, as `inc-lora` says. Extra state: r more ranks a task.
    """

    name = "o-lora"
    paper = "Wang et al. 2023, arXiv 2310.14152"
    summary = "a new LoRA for each task, kept orthogonal to the frozen ones of earlier tasks"
    Options = OLoraOptions
    looks = False
    state = "per task"
    inference = "per task"

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter."""
        check_growable(model, self.name)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Of the ranks that later tasks add."""
        return Estimate([grown_cost(model, len(stream) - 1)])

    def begin(self, context: Context, stage: Stage) -> None:
        """Append the task's LoRA."""
        self.grown = Grown.for_task(context.model, stage.index, context.seed)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Freeze the earlier ones."""
        return [self.grown.attach(model, optimizer)]

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """Both terms; of the overlap there is nothing in the first task."""
        grown, options, terms = self.grown, self.options, []
        if grown.frozen and options.orthogonality:
            terms.append(options.orthogonality * overlap(grown.old_a(), grown.new_a(), options.overlap))
        if options.norm:
            norms = [torch.linalg.vector_norm(w) for w in (*grown.new_a(), *grown.new_b())]
            terms.append(options.norm * torch.stack(norms).sum())
        return loss + torch.stack(terms).sum() if terms else loss

    def end(self, context: Context, stage: Stage) -> None:
        """Record the rank, and how far from orthogonal the new LoRA is."""
        grown = self.grown
        with torch.no_grad():
            left = float(overlap(grown.old_a(), grown.new_a(), self.options.overlap))
        grown.summary(left).write(context.folder / "adapters.json")
