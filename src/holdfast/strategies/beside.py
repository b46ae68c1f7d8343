"""What a prior of inputs can't rate (experts, embeddings, norms, biases), held beside it weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Anchor, Control, apply_control
from holdfast.hold.attach import Handle
from holdfast.hold.reference import weights_of
from holdfast.hold.unheld import apart
from holdfast.importance import ImportancePrior
from holdfast.importance.beside import as_beside, left_to_rate
from holdfast.strategies.context import Context
from holdfast.tasks.task import Task

FOLDER = "prior_beside"


class Beside:
    """A prior by weight of what another prior leaves out, joined over tasks and held by an anchor (λ 600).

    Parameters
    ----------
    options : options model
        Of an importance by weight.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.prior: ImportancePrior | None = None
        self._anchor: Anchor | None = None

    def begin(self, model: nn.Module, control: Control, seed: int, maps: ImportancePrior) -> ImportancePrior:
        """Return to the weights as they are now, while `maps`, which comes back, holds the others."""
        self._anchor = None
        if self.prior is None:
            return maps
        maps, prior = apart(maps, apply_control(self.prior, control, seed=seed), model)
        self._anchor = Anchor(prior, reference=weights_of(model, prior.tensors))
        return maps

    def attach(self, model: nn.Module, optimizer: Optimizer) -> list[Handle]:
        """Hold from the first step on."""
        return [] if self._anchor is None else [self._anchor.attach(model, optimizer)]

    def end(self, context: Context, task: Task, model: nn.Module, maps: ImportancePrior) -> None:
        """Rate what `maps`, the task's other prior, leaves out, and join it with the earlier tasks'."""
        left = left_to_rate(model, self.options, maps)
        if not left:
            return
        prior = context.importance(task, self.options, model, parameters=left, folder=FOLDER)
        prior = as_beside(prior).mean_normalised()
        self.prior = prior if self.prior is None else self.prior.merge(prior)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The joined prior."""
        return ({}, {}) if self.prior is None else (dict(self.prior.tensors), dict(self.prior.meta))

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take it back."""
        if tensors:
            self.prior = ImportancePrior(dict(tensors), dict(values))
