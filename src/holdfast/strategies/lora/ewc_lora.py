"""EWC-LoRA: one LoRA for all tasks, held by the Fisher of the weights that it changes (Zheng et al. 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold.cost import Cost, Estimate
from holdfast.importance import compute_prior
from holdfast.importance.fisher import FisherOptions
from holdfast.models.adapters import check_plain_lora, is_quantised, lora_layers, scale_of, under_lora
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import Task, TaskStream


class EwcLoraOptions(Options):
    """Strength of the penalty, size of the Fisher estimate, and how much of the old one stays."""

    name: Literal["ewc-lora"] = "ewc-lora"
    strength: float = Field(3e3, gt=0, description="lambda of the penalty")
    fisher: FisherOptions = Field(default_factory=FisherOptions)
    gamma: float = Field(1.0, gt=0, le=1, description="share of the old Fisher that stays with each task")


def product(layer: Any) -> Tensor:
    """What LoRA adds to a layer's weight, alpha / r B A, as that weight is laid out; differentiable."""
    change = scale_of(layer) * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    return change.T if layer.fan_in_fan_out else change


@register
class EwcLora(Strategy):
    """The loss + lambda / 2 sum F (dW - dW*)^2 over all entries of dW = alpha/r B A, dW* before the task.

    F is the diagonal Fisher of the adapted weights W themselves, per sample and of the true answers, summed
    over tasks (or decaying by `gamma`): the gradient by dW is the gradient by W. A Fisher of A and of B would
    not see that they act as a product, and would rate A as zero while B is. One LoRA is trained on and on, so
    neither the adapter nor the state grows. The paper's equations were not found: the penalty is written from
    its abstract and reviews, which name these parts. Its Fisher is estimated through the low-rank factors in
    some way; ours is exact for the samples. The authors' configuration for ImageNet-A (a ViT) has lambda 1e7,
    gamma 1, rank 10 and 5e-4.

    The term is in the loss, once per optimizer step, before clipping. Extra state: one value for each entry
    of the adapted weights (as large as the weights that LoRA adapts, in float32).
    """

    name = "ewc-lora"
    paper = "Zheng et al. 2026, arXiv 2602.17559"
    summary = "quadratic penalty on moving LoRA's product, scaled by the Fisher of the full weights"
    Options = EwcLoraOptions
    looks = False
    state = "constant"
    ends_untrained = True

    def __init__(self, options: EwcLoraOptions) -> None:
        super().__init__(options)
        self.fisher: dict[str, Tensor] = {}
        self._held: list[tuple[Any, Tensor, Tensor]] = []  # layer, lambda F, dW*

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter, on weights that can have a gradient."""
        check_plain_lora(model, self.name, "holds one LoRA", "rates the product of an adapter's two factors")
        packed = [name for name, layer in lora_layers(model).items() if is_quantised(under_lora(layer))]
        if packed:
            raise ConfigError(
                f"strategy.name: '{self.name}' takes the Fisher of the weights under the adapter, which need "
                f"a gradient for it, and '{packed[0]}' is quantised. Give the model's full weights (without "
                "model.quantise), or take 'ewc', which rates the factors."
            )

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The Fisher, and in training F and dW* beside the product and its gradient."""
        count = sum(layer.in_features * layer.out_features for layer in lora_layers(model).values())
        return Estimate(
            [
                Cost("Fisher of the adapted weights (float32, on the CPU)", 4 * count),
                Cost("penalty (F, LoRA's product before the task and now, its gradient)", 4 * 4 * count),
            ]
        )

    def begin(self, context: Context, stage: Stage) -> None:
        """Take the product that the stage starts from."""
        self._held = []
        for name, layer in lora_layers(context.model).items():
            if name in self.fisher:
                start = product(layer).detach()
                self._held.append((layer, (self.options.strength * self.fisher[name]).to(start), start))

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With the penalty, from the second task on."""
        terms = [(weight * (product(layer) - start).square()).sum() for layer, weight, start in self._held]
        return loss + torch.stack(terms).sum() / 2 if terms else loss

    def end(self, context: Context, stage: Stage) -> None:
        """Add this task's Fisher."""
        self._held = []
        for task in stage.tasks:
            for name, value in self._fisher_of(context, task).items():
                old = self.fisher.get(name)
                self.fisher[name] = value if old is None else self.options.gamma * old + value

    def _fisher_of(self, context: Context, task: Task) -> Mapping[str, Tensor]:
        """Of the frozen weights under the adapter, which need a gradient for the while."""
        weights = {n: layer.get_base_layer().weight for n, layer in lora_layers(context.model).items()}
        rows = context.encoder.many(task.train)
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            with context.progress.bar(f"Fisher of {task.name}", total=len(rows)) as bar:
                return compute_prior(
                    context.model,
                    rows,
                    self.options.fisher,
                    pad_id=context.tokenizer.pad_token_id,
                    seed=context.seed,
                    task=task.name,
                    parameters=weights,
                    progress=bar,
                ).tensors
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The Fisher."""
        return dict(self.fisher), {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take it back."""
        self.fisher = dict(tensors)
