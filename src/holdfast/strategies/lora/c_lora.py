"""CLoRA: LoRA that is kept off fixed subspaces of its input and output (Lu et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.hold.cost import Cost, Estimate
from holdfast.importance.seeding import seed_for
from holdfast.models.adapters import check_plain_lora, lora_layers, rank_of
from holdfast.records import AdapterRanks
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class CLoraOptions(Options):
    """How large a subspace LoRA shall leave alone, and how strongly."""

    name: Literal["c-lora"] = "c-lora"
    share: float = Field(0.5, gt=0, le=1, description="k: columns of P, as a share of a map's width")
    strength: float = Field(1.0, ge=0, description="lambda of the penalty")

    @model_validator(mode="after")
    def _only_what_applies(self) -> CLoraOptions:
        if not self.strength:
            self.refuse_ignored(("share",), "with `strength: 0`")
        return self


def subspace(width: int, share: float, seed: int) -> Tensor:
    """P (width, k): k = share of the width orthonormal columns, at least one, drawn by the seed; float32."""
    draw = torch.randn(width, max(round(share * width), 1), generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw)[0]


@register
class CLora(Strategy):
    """One LoRA for all tasks, with the loss + lambda sum over layers of ‖A P_a‖^2 + ‖Bᵀ P_b‖^2.

    P_a (input, k) and P_b (output, k) are drawn once and stay: inputs in the span of P_a fall into the null
    space of B A, and no output of B A has a part in P_b, so the change of the output is smaller at the same
    rank. Squared Frobenius norms. That P is fixed and that both sides are bound is from the paper's abstract
    and reviews; its code, k and lambda were not found. That P is random and orthonormal, the squares, and
    both values are ours. It holds no task in particular: the subspaces know nothing of the data. The term is
    in the loss, once per optimizer step. Extra state: none, P is drawn again from the run's seed.
    """

    name = "c-lora"
    paper = "Lu et al. 2025, arXiv 2410.16801"
    summary = "one LoRA whose update is kept out of fixed subspaces of inputs and outputs"
    Options = CLoraOptions
    looks = False

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter."""
        check_plain_lora(model, self.name, "binds a LoRA", "bounds the two factors of an adapter")

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The subspaces."""
        sides = [width for layer in lora_layers(model).values() for width in self._widths(layer)]
        size = sum(4 * width * max(round(self.options.share * width), 1) for width in sides)
        return Estimate([Cost("fixed subspaces of inputs and outputs", size)])

    @staticmethod
    def _widths(layer: Any) -> tuple[int, int]:
        return layer.lora_A["default"].weight.shape[1], layer.lora_B["default"].weight.shape[0]

    def begin(self, context: Context, stage: Stage) -> None:
        """Draw the subspaces, the same in each task."""
        self._bound = []
        for name, layer in lora_layers(context.model).items():
            for side, width in zip("ab", self._widths(layer), strict=True):
                factor = layer.lora_A["default"].weight if side == "a" else layer.lora_B["default"].weight
                columns = subspace(width, self.options.share, seed_for(f"{side}:{name}", context.seed))
                self._bound.append((factor, side, columns.to(factor)))

    def inside(self) -> Tensor:
        """The sum over layers of ‖A P_a‖^2 + ‖Bᵀ P_b‖^2; a differentiable scalar."""
        parts = [(f if side == "a" else f.T) @ columns for f, side, columns in self._bound]
        return torch.stack([part.square().sum() for part in parts]).sum()

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With the penalty."""
        return loss + self.options.strength * self.inside() if self.options.strength else loss

    def end(self, context: Context, stage: Stage) -> None:
        """Record how much of the factors is left in the subspaces."""
        with torch.no_grad():
            total = torch.stack([factor.square().sum() for factor, _, _ in self._bound]).sum()
            left = float(self.inside() / total)
        self._bound = []
        record = AdapterRanks(rank=rank_of(context.model), frozen=0, inside=left)
        record.write(context.folder / "adapters.json")
