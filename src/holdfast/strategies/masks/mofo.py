"""MoFO: each step moves only the weights with the largest momentum (Chen et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold import Handle
from holdfast.hold.attach import hook, unwrap
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.strategies.masks.units import lowest
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream

_FIRST = "exp_avg"  # torch's name of Adam's first moment


class MofoOptions(Options):
    """How much of each tensor moves at a step."""

    name: Literal["mofo"] = "mofo"
    updated: float = Field(0.15, gt=0, le=1, description="alpha: share of each tensor that a step moves")


@register
class Mofo(Strategy):
    """After Adam's step all but the share of a tensor with the largest |m| goes back to what it was.

    m is Adam's first moment with this step's gradient in it. Both moments go on for all weights; the filter
    is on the weights alone. The authors' script for Llama-2-7B on MetaMathQA has 15 %, 2e-5 and batches of
    128; their code lets norms and biases move freely and weight decay act on all, here all is filtered. What
    ties with the largest held value is held, so a tensor without momentum does not move. The paper fine-tunes
    once and compares with pre-training; here each task is such a fine-tuning. It has no notion of an earlier
    task: it only moves less. Needs ``training.optimizer: adamw``. Extra state: none; during training a copy
    of the trained weights.
    """

    name = "mofo"
    paper = "Chen et al. 2024, arXiv 2407.20999"
    summary = "each step moves only the weights with the largest momentum of their tensor"
    Options = MofoOptions
    optimizer = "adamw"

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The weights before each step."""
        return Estimate([Cost("the weights before each step", trained_bytes(model))])

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Filter every step.

        Raises
        ------
        ConfigError
            The optimizer has no first moment.
        """
        inner = unwrap(optimizer)
        lacking = ConfigError(
            f"strategy.name: 'mofo' filters by Adam's first moment, which {type(inner).__name__} doesn't "
            f"keep as '{_FIRST}'. Use torch's AdamW (training.optimizer: adamw)."
        )
        if "betas" not in inner.defaults:
            raise lacking
        before: list[tuple[nn.Parameter, torch.Tensor]] = []

        def keep() -> None:
            parameters = [p for group in inner.param_groups for p in group["params"]]
            before[:] = [(p, p.detach().clone()) for p in parameters if p.grad is not None]

        def put_back() -> None:
            for parameter, was in before:
                if _FIRST not in inner.state[parameter]:  # Adam in 8 bits: its state shows after a step
                    raise lacking
                size = inner.state[parameter][_FIRST].abs()
                parameter.copy_(torch.where(lowest(size, 1 - self.options.updated), was, parameter))
            before.clear()

        return [hook(inner, keep, put_back)]
