"""SLAO: one LoRA, into which each task's is merged by 1 / √i (Qiao & Mahdavi 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.hold.cost import Cost, Estimate
from holdfast.models.adapters import check_plain_lora, lora_layers, rank_of
from holdfast.records import AdapterRanks
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class SlaoOptions(Options):
    """Nothing to choose: rank, alpha and dropout are those of ``model.lora``."""

    name: Literal["slao"] = "slao"


def orthogonal_rows(a_RD: Tensor) -> Tensor:
    """Qᵀ of the QR decomposition of Aᵀ, its signs such that R's diagonal is not negative: rows of norm 1."""
    q_DR, r_RR = torch.linalg.qr(a_RD.T.double())
    signs_R = torch.where(r_RR.diagonal() < 0, -1.0, 1.0).to(q_DR)
    return (q_DR * signs_R).T.to(a_RD)


@register
class Slao(Strategy):
    """Task i trains one LoRA from A = Qᵀ, B = B_{i-1}; then B <- B_m + (B_i - B_m) / √i, and A <- A_i.

    QR is of A_{i-1}ᵀ, the last task's trained A, and B_{i-1} is the last task's trained B, not the merged
    B_m, which is what answers between tasks. QR's signs are free; ours keep each row on its side. The first
    task is plain LoRA. From reviews of the paper and its abstract; it says that A's are alike across tasks
    while B's are not, which is why B alone is averaged. Its ranks and learning rates were not found.
    A start of norm-1 rows is larger than PEFT's by √3. Extra state: the last task's B.
    """

    name = "slao"
    paper = "Qiao & Mahdavi 2025, arXiv 2512.23017"
    summary = "one LoRA; each task starts from orthogonal directions and is merged in by 1 / √i"
    Options = SlaoOptions
    state = "constant"
    begins_as_before = False  # it begins with other factors

    def __init__(self, options: SlaoOptions) -> None:
        super().__init__(options)
        self.trained_b: dict[str, Tensor] = {}  # B_{i-1} by adapted layer
        self._merged_b: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter."""
        check_plain_lora(model, self.name, "merges LoRAs", "averages a factor of an adapter")

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The last task's B, and the merged one."""
        factors = [layer.lora_B["default"].weight for layer in lora_layers(model).values()]
        size = sum(b.numel() * b.element_size() for b in factors)
        return Estimate([Cost("B of the last task, and the merged B", 2 * size)])

    @torch.no_grad()
    def begin(self, context: Context, stage: Stage) -> None:
        """Put the merged B aside and start anew from the last task's factors."""
        self._merged_b = {}
        for name, layer in lora_layers(context.model).items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if name in self.trained_b:
                self._merged_b[name] = b.detach().clone()
                a.copy_(orthogonal_rows(a))
                b.copy_(self.trained_b[name])

    @torch.no_grad()
    def end(self, context: Context, stage: Stage) -> None:
        """Merge."""
        share = 1 / math.sqrt(stage.index + 1)
        for name, layer in lora_layers(context.model).items():
            b = layer.lora_B["default"].weight
            self.trained_b[name] = b.detach().cpu().clone()
            if name in self._merged_b:
                b.copy_(torch.lerp(self._merged_b[name], b, share))
        self._merged_b = {}
        record = AdapterRanks(rank=rank_of(context.model), frozen=0, merged=share)
        record.write(context.folder / "adapters.json")

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The last task's B."""
        return dict(self.trained_b), {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take it back."""
        self.trained_b = dict(tensors)
