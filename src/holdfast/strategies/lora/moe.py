"""LoRAMoE: experts of LoRA under a router, with the localized balancing constraint (Dou et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold import Handle
from holdfast.hold.cost import Cost, Estimate, trained_numbers
from holdfast.models.adapters import NAME, check_plain_lora, lora_layers, rank_of, scale_ratio
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.lora.ranks import Weighted, weigh
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream

SUBMODULE = "lora_routers"  # what is trained beside LoRA, as the model's own submodule


class LoraMoeOptions(Options):
    """How many experts there are, and how they are balanced."""

    name: Literal["lora-moe"] = "lora-moe"
    experts: int = Field(4, ge=2, description="N, into which the ranks of model.lora are divided")
    types: int = Field(2, ge=1, description="kinds of experts; a task's kind is its number modulo this")
    balance: float = Field(0.1, ge=0, description="beta, weight of the balancing constraint")
    delta: float = Field(0.1, ge=0, le=1, description="how unlike experts of the task's kind and others are")

    @model_validator(mode="after")
    def _goes_together(self) -> LoraMoeOptions:
        if self.balance == 0:
            self.refuse_ignored(("types", "delta"), "with `balance: 0`, which takes the constraint away")
        if self.types == 1:
            self.refuse_ignored(("delta",), "with `types: 1`, where there are no others")
        if self.experts % self.types:
            raise ValueError(f"`experts: {self.experts}` can't be divided into {self.types} equal `types`")
        return self


class Routers(nn.Module):
    """One linear map from the input of each adapted layer to its experts, started as PyTorch starts one.

    Parameters
    ----------
    widths : sequence of int
        The layers' inputs.
    """

    def __init__(self, widths: Sequence[int], experts: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.maps = nn.ParameterList()
        for width in widths:
            bound = 1 / math.sqrt(width)
            self.maps.append(nn.Parameter(bound * (2 * torch.rand(experts, width, generator=draw) - 1)))

    def shares(self, number: int, x_BTD: Tensor) -> Tensor:
        """The softmax over a layer's experts for each token: (B, T, N) float32."""
        return (x_BTD @ self.maps[number].T.to(x_BTD)).float().softmax(-1)


def imbalance(importance_BN: Tensor, kind: int, types: int, delta: float) -> Tensor:
    """var(Z) / mean(Z)^2 over all entries of Z = I * Q, Q_bn the sum of expert n's shares over row b.

    I is 1 + delta for the experts of the row's kind and 1 - delta for the others; experts of a kind stand
    side by side. Variance (that of a sample) and the squared mean are those of the authors' code.
    """
    experts = importance_BN.shape[1]
    own_N = torch.arange(experts, device=importance_BN.device) // (experts // types) == kind
    new = importance_BN.new_tensor
    z_BN = importance_BN * torch.where(own_N, new(1 + delta), new(1 - delta))
    return z_BN.var() / (z_BN.mean().square() + 1e-10)


@register
class LoraMoe(Strategy):
    """W x + alpha/r_e sum_n w_n B_n A_n x, w = softmax(W_g x) for each token; the loss + beta L_lbc.

    L_lbc = var(Z) / mean(Z)^2 (`imbalance`), here the mean over adapted layers; padding does not count. The N
    experts are the ranks of ``model.lora`` in equal blocks of r_e, so it is one adapter, with a router beside
    each layer. Routers and experts are trained on and on; nothing but the router keeps tasks apart.

    The paper trains once on mixed data of two kinds (world knowledge or not), with half of the experts for
    each. In a stream a row's kind is not known: here it is its task's number modulo `types`. By its equation
    the constraint is least where experts of the row's kind get (1 - delta) / (1 + delta) of the others'
    share, whatever the name says. Authors' script: 8 experts of rank 4, alpha 32, the three maps of the
    feed-forward layers, 2e-4, dropout 0.05, beta and delta 0; 0.1 is ours. Their code has the same var /
    mean^2. Extra state: the routers, which the adapter's folder lacks.
    """

    name = "lora-moe"
    paper = "Dou et al. 2024, arXiv 2312.09979"
    summary = "experts of LoRA, weighted for each token by a router under a balancing constraint"
    Options = LoraMoeOptions
    looks = False
    state = "constant"
    inference = "constant"

    def __init__(self, options: LoraMoeOptions) -> None:
        super().__init__(options)
        self.around_blocks = options.balance > 0  # by what the routers tell the constraint
        self.maps: dict[str, Tensor] = {}  # of the routers, as the last task left them
        self._real: list[Tensor] = []  # True at real tokens: of the input, of the answer
        self._importance: dict[int, Tensor] = {}  # Q of each layer in this micro-batch

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter whose ranks can be divided among the experts."""
        check_plain_lora(model, self.name, "divides a LoRA into experts", "weights each rank of an adapter")
        if rank_of(model) % self.options.experts:
            raise ConfigError(
                f"strategy.experts: LoRA's {rank_of(model)} ranks (model.lora.r) can't be divided among "
                f"{self.options.experts} experts. Give a rank that is a multiple of it."
            )

    def _fresh(self, model: nn.Module, seed: int) -> Routers:
        widths = [layer.lora_A["default"].weight.shape[1] for layer in lora_layers(model).values()]
        return Routers(widths, self.options.experts, seed)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The routers are trained beside LoRA; with gradients and AdamW's states."""
        routers = trained_numbers(self._fresh(model, 0))
        return Estimate([Cost("routers", 4 * routers)], trained_numbers(model) + routers)

    def _attach(self, model: Any, routers: Routers, gather: bool) -> Handle:
        """Weight the experts' ranks by their shares, times N (rsLoRA: √N): alpha/r then means alpha/r_e."""
        experts = self.options.experts
        times = scale_ratio(model.peft_config[NAME].use_rslora, experts, 1)

        def by(number: int, x_BTD: Tensor, output_BTR: Tensor) -> Tensor:
            shares_BTN = routers.shares(number, x_BTD)
            if gather:
                real = [mask for mask in self._real if mask.shape == shares_BTN.shape[:-1]]
                kept = torch.stack(real).any(0)[..., None] if real else 1.0
                self._importance[number] = (shares_BTN * kept).sum(1)
            block = output_BTR.shape[-1] // experts
            return output_BTR * (times * shares_BTN).repeat_interleave(block, -1).to(output_BTR)

        return weigh(model, by)

    def begin(self, context: Context, stage: Stage) -> None:
        """Put the routers into the model, as the last task left them."""
        routers = self._routers = self._fresh(context.model, context.seed)
        if self.maps:
            routers.load_state_dict(self.maps)
        self._kind = stage.index % self.options.types
        context.model.add_module(SUBMODULE, routers.to(next(context.model.parameters()).device))

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Route while training."""
        return [self._attach(model, self._routers, gather=True)]

    def watch(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Tell tokens from padding."""
        self._importance = {}
        self._real = [
            batch[key] != off for key, off in (("attention_mask", 0), ("labels", -100)) if key in batch
        ]

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With the balancing constraint."""
        options = self.options
        if not options.balance:
            return loss
        terms = [imbalance(q, self._kind, options.types, options.delta) for q in self._importance.values()]
        return loss + options.balance * torch.stack(terms).mean()

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """The routers: a checkpoint of a PEFT model holds its adapter alone."""
        return {name: value.detach() for name, value in self._routers.state_dict().items()}

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self._routers.load_state_dict(dict(tensors))

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the routers, and leave the model as it was."""
        self.maps = {n: value.detach().cpu().clone() for n, value in self._routers.state_dict().items()}
        self._importance = {}
        delattr(context.model, SUBMODULE)

    def route(self, model: Any, task: str | None) -> Any:
        """The model with its routers."""
        if not self.maps:
            return model
        routers = self._fresh(model, 0)
        routers.load_state_dict(self.maps)
        routers.to(next(model.parameters()).device)
        return Weighted(model, lambda ids_BT, _: self._attach(model, routers, gather=False))

    def export(self, context: Context, folder: Path) -> None:
        """Refuse: no plain adapter has routers."""
        raise ConfigError(
            "export: strategy 'lora-moe' weights the adapter's ranks by routers, which no plain Hugging Face "
            "folder can hold. Go on with the learner itself (holdfast.Learner.load)."
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The routers."""
        return dict(self.maps), {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.maps = dict(tensors)
