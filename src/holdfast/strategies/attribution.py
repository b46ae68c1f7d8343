"""Attribution-guided continual learning (A): importance after a task, protection during the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options, named_or
from holdfast.errors import ConfigError, HoldfastError, PriorMismatchError
from holdfast.hold import AnchorOptions, Control, MechanismOptions, apply_control, build_mechanism
from holdfast.hold.attach import Handle, Protection
from holdfast.hold.cost import Estimate, prior_costs
from holdfast.hold.drift import Drift
from holdfast.hold.reference import weights_of
from holdfast.importance import ImportanceOptions, ImportancePrior
from holdfast.importance.lrp import LrpOptions
from holdfast.importance.prior import Kind
from holdfast.importance.registry import REGISTRY
from holdfast.records import ProtectionSummary
from holdfast.strategies.protocol import Context, Stage, Strategy, register
from holdfast.tasks.task import TaskStream


class AttributionStrategyOptions(Options):
    """Importance × mechanism × control, and where the prior comes from."""

    name: Literal["attribution"] = "attribution"
    importance: Annotated[ImportanceOptions, BeforeValidator(named_or("lrp"))] = Field(
        default_factory=LrpOptions
    )
    mechanism: Annotated[MechanismOptions, BeforeValidator(named_or("anchor"))] = Field(
        default_factory=AnchorOptions
    )
    control: Control = "none"
    prior_from: Literal["sequential", "single_task"] = Field(
        "sequential",
        description="sequential: the model right after it learned the task; single_task (A): a separate "
        "model fine-tuned from the base on that task alone",
    )
    merge: Literal["max", "sum", "mean"] | None = Field(
        None, description="how priors are joined (default: max, eq. 12; importance `inputs`: sum)"
    )
    balance: bool = Field(
        True,
        description="scale each task's prior to mean 1 before joining, so that none outweighs the others",
    )
    initial_prior: str | None = Field(
        None, description="folder of a prior of `holdfast attribute`: protect what the base knows"
    )

    @property
    def kind(self) -> Kind:
        """Of the priors."""
        return REGISTRY[self.importance.name].kind

    @model_validator(mode="after")
    def _by_kind(self) -> AttributionStrategyOptions:
        """Fill in what depends on the kind of prior, so that a recorded configuration is complete."""
        if self.merge == "max" and self.kind == "inputs":
            raise ValueError(
                "`merge: max` is for priors by weight; with `importance: inputs` use sum or mean"
            )
        changed: dict[str, Any] = {"merge": self.merge or ("sum" if self.kind == "inputs" else "max")}
        if isinstance(self.mechanism, AnchorOptions):
            try:
                changed["mechanism"] = self.mechanism.resolved(self.kind)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        self.__dict__.update(changed)  # the model is frozen, and not yet anybody's
        return self


@register
class Attribution(Strategy):
    """A, section 4.2, with every part a choice.

    Each task's prior (of the model that learned it, or of one of its own) is joined with the earlier ones
    (eq. 12), put under the control, and handed to the mechanism for the next task. A's own choices are in
    ``configs/attribution_paper.yaml``; eq. 13's factor on a gradient cancels under Adam, hence the defaults.
    """

    name = "attribution"
    paper = "Liu et al. 2026, arXiv 2605.05285"
    summary = "holds the weights that earlier tasks need; any importance, mechanism and control"
    Options = AttributionStrategyOptions
    state = "constant"
    ends_untrained = True

    def __init__(self, options: AttributionStrategyOptions) -> None:
        super().__init__(options)
        self.prior: ImportancePrior | None = None
        self._protection: Protection | None = None
        self._handle = Handle()

    def check(self, model: nn.Module) -> None:
        """Take the initial prior, if one is given, and see that it fits."""
        if self.options.initial_prior is None:
            return
        try:
            prior = ImportancePrior.load(self.options.initial_prior)
            prior.check_fits(model)
            if prior.kind != self.options.kind:
                raise PriorMismatchError(
                    f"it is of the kind '{prior.kind}', and strategy.importance makes '{self.options.kind}'; "
                    f"they can't be joined. Compute it with `--importance {self.options.importance.name}`."
                )
        except HoldfastError as error:
            raise type(error)(f"strategy.initial_prior: {error}") from error
        self.prior = prior.mean_normalised() if self.options.balance else prior

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The prior, and what acts on it; and the models of one task each."""
        alone = [(len(task.train), None) for task in stream if self.options.prior_from == "single_task"]
        return Estimate(prior_costs(model, self.options.importance), further=alone)

    def begin(self, context: Context, stage: Stage) -> None:
        """Build the protection; its reference is the weights that this stage starts from."""
        self._protection = None
        if self.prior is not None:
            prior = apply_control(self.prior, self.options.control, seed=context.seed)
            reference = weights_of(context.model, prior.tensors)
            self._protection = build_mechanism(self.options.mechanism, prior, reference)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Hold the weights from the first step on."""
        if self._protection is None:
            return ()
        self._handle = self._protection.attach(model, optimizer)
        return (self._handle,)

    def drift(self) -> Drift:
        """How far the outputs of earlier tasks have moved since this one began; priors by input only."""
        return self._handle.drift()

    def end(self, context: Context, stage: Stage) -> None:
        """Compute this task's prior and join it with the earlier ones (eq. 12)."""
        if self._protection is not None:
            moved = {} if self._handle.meter is None else {"drift": self.drift()._asdict()}
            ProtectionSummary(
                **self._protection.summary(),
                **moved,
                mechanism=self.options.mechanism.model_dump(),
                control=self.options.control,
            ).write(context.folder / "protection.json")
        self._protection, self._handle = None, Handle()
        (task,), model = stage.tasks, context.model
        if self.options.prior_from == "single_task":
            model = context.base_model()
            context.fit(model, task.train, f"single-task model of {task.name}")
        prior = context.importance(task, self.options.importance, model)
        prior = prior.mean_normalised() if self.options.balance else prior
        self.prior = prior if self.prior is None else self.prior.merge(prior, how=self.options.merge)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The joined prior."""
        return ({}, {}) if self.prior is None else (dict(self.prior.tensors), dict(self.prior.meta))

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take the joined prior back."""
        if tensors:
            self.prior = ImportancePrior(dict(tensors), dict(values))
