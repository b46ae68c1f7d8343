"""Attribution-guided continual learning (A): importance after a task, protection during the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.importance import ImportanceOptions, ImportancePrior, compute_prior
from holdfast.importance.lrp import LrpOptions
from holdfast.protect import (
    AnchorOptions,
    Control,
    Handle,
    MechanismOptions,
    Protection,
    apply_control,
    build_mechanism,
)
from holdfast.protect.reference import weights_of
from holdfast.storage import write_json
from holdfast.strategies.protocol import Context, Stage, Strategy, register


class AttributionStrategyOptions(Options):
    """Importance × mechanism × control, and where the prior comes from."""

    name: Literal["attribution"] = "attribution"
    importance: ImportanceOptions = Field(default_factory=LrpOptions)
    mechanism: MechanismOptions = Field(default_factory=AnchorOptions)
    control: Control = "none"
    prior_from: Literal["sequential", "single_task"] = Field(
        "sequential",
        description="sequential: the model right after it learned the task; single_task (A): a separate "
        "model fine-tuned from the base on that task alone",
    )
    merge: Literal["max", "sum", "mean"] = Field(
        "max", description="how priors of tasks are joined; max is eq. 12"
    )
    balance: bool = Field(
        True,
        description="scale each task's prior to mean 1 before joining: none outweighs the others by the size "
        "of its logits alone, and none loses its hold when more tasks follow",
    )
    initial_prior: str | None = Field(
        None, description="folder of a prior made by `holdfast attribute`: protect what the base model knows"
    )

    @field_validator("importance", "mechanism", mode="before")
    @classmethod
    def _of_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        """Options without a name (``mechanism: {strength: 100}``) are those of the default choice."""
        if isinstance(value, Mapping) and "name" not in value:
            return {"name": {"importance": "lrp", "mechanism": "anchor"}[str(info.field_name)], **value}
        return value


@register
class Attribution(Strategy):
    """A, section 4.2, with every part a choice.

    The prior of each task is computed when the task is learned (or by a model of its own, as A does),
    joined with those of earlier tasks (eq. 12), put under the chosen control, and handed to the chosen
    mechanism for the next task. A's own choices are in ``configs/attribution_paper.yaml``; the defaults
    differ from them because the letter of A does not hold anything under Adam (docs/results.md).
    """

    name = "attribution"
    paper = "Liu et al. 2026, arXiv 2605.05285"
    summary = "holds the weights that earlier tasks need; any importance, mechanism and control"
    Options = AttributionStrategyOptions

    def __init__(self, options: AttributionStrategyOptions) -> None:
        super().__init__(options)
        self.prior: ImportancePrior | None = None
        self._protection: Protection | None = None

    def prepare(self, context: Context) -> None:
        """Load the initial prior, if one is given."""
        if self.options.initial_prior is not None:
            self.prior = ImportancePrior.load(Path(self.options.initial_prior))
            self.prior.check_fits(context.model)

    def begin(self, context: Context, stage: Stage) -> None:
        """Build the protection; its reference is the weights that this stage starts from."""
        self._protection = None
        if self.prior is None:
            return
        prior = apply_control(self.prior, self.options.control, seed=context.seed)
        self._protection = build_mechanism(self.options.mechanism, prior, weights_of(context.model, prior))

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Hold the weights from the first step on."""
        return () if self._protection is None else (self._protection.attach(model, optimizer),)

    def end(self, context: Context, stage: Stage) -> None:
        """Compute this task's prior and join it with the earlier ones (eq. 12)."""
        if self._protection is not None:
            choice = {"mechanism": self.options.mechanism.model_dump(), "control": self.options.control}
            write_json(context.folder / "protection.json", {**self._protection.summary(), **choice})
        self._protection = None
        model = context.model
        (task,) = stage.tasks
        if self.options.prior_from == "single_task":
            model = context.base_model()
            context.fit(model, task.train, f"single-task model of {task.name}")
        rows = context.encoder.many(task.train)
        with context.progress.bar(f"importance of {task.name}", total=len(rows)) as bar:
            prior = compute_prior(
                model,
                rows,
                self.options.importance,
                pad_id=context.tokenizer.pad_token_id,
                seed=context.seed,
                task=task.name,
                progress=bar,
            )
        prior.save(context.folder / "prior")
        if self.options.balance:
            prior = prior.mean_normalised()
        self.prior = prior if self.prior is None else self.prior.merge(prior, how=self.options.merge)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The joined prior."""
        return ({}, {}) if self.prior is None else (dict(self.prior.tensors), dict(self.prior.meta))

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take the joined prior back."""
        if tensors:
            self.prior = ImportancePrior(dict(tensors), dict(values))
