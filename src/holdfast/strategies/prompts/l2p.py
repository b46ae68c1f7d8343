"""Learning to Prompt: each input finds its prompts in a pool by their keys (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.hold.cost import Estimate, trained_numbers
from holdfast.models import is_encoder_decoder
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.prompts.pool import PoolOptions, PromptPool, check_feature, fresh_pool, query
from holdfast.strategies.prompts.soft import Prompted, check_promptable, learn, question
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class L2pOptions(PoolOptions):
    """The pool, what an input is found by, and the pull on the keys."""

    name: Literal["l2p"] = "l2p"
    weight: float = Field(0.5, ge=0, description="lambda of eq. 5")
    diversify: bool = Field(True, description="eq. 4: in training, shun what earlier tasks have used")


@register
class L2p(Strategy):
    """x reads [P_s1, ..., P_sN, x]; loss + lambda sum_i (1 - cos(q(x), k_si)) (eqs. 2, 3 and 5).

    s_1 ... s_N are the keys nearest to q(x) by cosine; prompts and keys learn, the model is frozen. M 20,
    N 4, L 5, lambda 0.5 and ``diversify`` are the paper's for diverse tasks (for similar ones M 10, N 5 and
    without), at a constant rate of 0.03: in training a distance is weighted by how often earlier tasks took
    that prompt, plus one, so that of unused prompts the nearest come first (eq. 4). A test follows eq. 3.

    Deviations: the paper's q is a vision transformer's [class] feature, and its classifier sees the prompts'
    outputs; here q is a mean over the question (never the answer), and the model answers. Prompts start from
    random tokens' embeddings, keys from a normal draw. Eq. 5 is averaged over the batch. ``query: hidden``
    costs a forward pass more for each input. Extra state: the pool, and M counts.
    """

    name = "l2p"
    paper = "Wang et al. 2022, arXiv 2112.08654"
    summary = "each input finds its soft prompts in a pool by their keys; the model is frozen"
    Options = L2pOptions
    loss_trains = True
    reads = ("input_ids", "attention_mask", "labels")
    looks = False
    state = "constant"
    inference = "constant"
    begins_as_before = False  # it chooses prompts otherwise

    def __init__(self, options: L2pOptions) -> None:
        super().__init__(options)
        self.tensors: dict[str, Tensor] = {}  # prompts (M, L, D), keys (M, K), counts (M,) of earlier tasks

    def check(self, model: nn.Module) -> None:
        """See that prompts can be put in front of the model's input, and that it gives the query."""
        check_promptable(model, self.name)
        check_feature(model, self.options.query)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The pool is all that is trained."""
        return Estimate(trained=trained_numbers(fresh_pool(model, self.options, 0)))

    def begin(self, context: Context, stage: Stage) -> None:
        """Put the pool into the model, as the last task left it."""
        self._counts = torch.zeros(self.options.pool)  # how often this task has taken each prompt
        if not self.tensors:
            fresh = fresh_pool(context.model, self.options, context.seed)
            self.tensors = {**fresh.state_dict(), "counts": self._counts}
        pool = self._pool = PromptPool(self.tensors["prompts"], self.tensors["keys"])
        self._training = learn(context.model, pool, lambda ids_BT, _: pool.chosen(self._indices))

    def watch(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Choose here, where the labels still tell the question from the answer."""
        asked = question(batch["attention_mask"], None if is_encoder_decoder(model) else batch["labels"])
        self._query = query(model, batch["input_ids"], asked, self.options.query)
        weights = self.tensors["counts"] + 1 if self.options.diversify else None
        self._indices = self._pool.nearest(self._query, self.options.chosen, weights)
        if torch.is_grad_enabled():
            taken = self._indices.cpu().flatten().bincount(minlength=self.options.pool)
            world.add_up([taken])
            self._counts = self._counts + taken

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With the pull of the chosen keys to the queries."""
        distances = self._pool.distances(self._query).gather(1, self._indices)
        return loss + self.options.weight * distances.sum(1).mean()

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """How often each prompt was taken so far."""
        return {"counts": self._counts}

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on counting."""
        self._counts = tensors["counts"].clone()

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the pool, and leave the model as it was."""
        self._training.remove()
        learned = {name: tensor.cpu().clone() for name, tensor in self._pool.state_dict().items()}
        self.tensors = {**learned, "counts": self.tensors["counts"] + self._counts}

    def route(self, model: Any, task: str | None) -> Any:
        """The model with the prompts that each input finds; `task` is never given."""
        if not self.tensors:
            return model
        pool = PromptPool(self.tensors["prompts"], self.tensors["keys"]).to(model.device)
        return Prompted(model, pool.source(model, self.options.query, self.options.chosen))

    def export(self, context: Context, folder: Path) -> None:
        """Refuse: no plain model looks its prompts up."""
        raise ConfigError(
            "export: strategy 'l2p' answers with prompts that each input finds in a pool, which no plain "
            "Hugging Face folder can hold. The frozen model is the one that you started from; go on with the "
            "learner itself (holdfast.Learner.load)."
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The pool, and how often its prompts were taken."""
        return dict(self.tensors), {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.tensors = dict(tensors)
