"""Attribution-guided continual learning (A): importance after a task, protection during the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options, named, named_or
from holdfast.errors import ConfigError, HoldfastError, PriorMismatchError
from holdfast.hold import AnchorOptions, Control, MechanismOptions, apply_control, build_mechanism
from holdfast.hold.anchor import LORA_PULL
from holdfast.hold.attach import Handle, Protection, together
from holdfast.hold.cost import Estimate, prior_costs
from holdfast.hold.drift import Drift
from holdfast.hold.reference import weights_of
from holdfast.importance import ImportanceOptions, ImportancePrior
from holdfast.importance.beside import left_to_rate
from holdfast.importance.fisher import FisherOptions
from holdfast.importance.inputs import InputsOptions
from holdfast.importance.prior import Kind, default_merge
from holdfast.importance.registry import REGISTRY
from holdfast.models import block_parameters, input_dims
from holdfast.models.adapters import is_adapted, under_adapter
from holdfast.records import ProtectionSummary
from holdfast.strategies.beside import Beside
from holdfast.strategies.lora.grown import grown_cost
from holdfast.strategies.lora.merged import (
    Merged,
    export_merged,
    form_for,
    held_rows,
    of_whole_maps,
)
from holdfast.strategies.protocol import Context, Stage, Strategy, register
from holdfast.tasks.task import TaskStream

_BESIDE = "beside"  # in the state, before the names of weights that are held one by one
_UNDER = "under."  # in the state, before the names of weights under the adapter


class AttributionStrategyOptions(Options):
    """Importance × mechanism × control, and where the prior comes from."""

    name: Literal["attribution"] = "attribution"
    importance: Annotated[ImportanceOptions, BeforeValidator(named_or("inputs"))] = Field(
        default_factory=InputsOptions
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
    others: Annotated[ImportanceOptions, BeforeValidator(named)] | Literal["none"] | None = Field(
        None,
        description="importance `inputs` only: by what else that is trained is rated, and held weight by "
        "weight: experts, embeddings, norms, biases, which are no linear maps (default: fisher; none)",
    )
    merge_lora: Literal["adapters", "weights", "none"] | None = Field(
        None,
        description="importance `inputs` with LoRA: each task has a LoRA of its own, which begins in what "
        "earlier inputs leave free and is held there; then it stays as frozen ranks (adapters), or goes into "
        "the weights (weights). none: one LoRA for all tasks, both factors held (default: adapters, where "
        "the LoRA is a plain one)",
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
        if self.merge_lora in ("adapters", "weights") and self.kind != "inputs":
            raise ValueError(
                f"`merge_lora: {self.merge_lora}` begins and holds each task's LoRA by the inputs of earlier "
                f"ones, which `importance: {self.importance.name}` doesn't know; take `importance: inputs`"
            )
        if self.others is not None and self.kind != "inputs":
            raise ValueError(
                f"`others` is for what `importance: inputs` can't rate; `{self.importance.name}` rates every "
                "weight by itself. Leave it out."
            )
        if isinstance(self.others, Options) and REGISTRY[self.others.name].kind != "weights":  # type: ignore[attr-defined]
            raise ValueError("`others` takes an importance by weight, such as fisher or lrp; or none")
        if self.importance.name == "uniform":
            same = "with `importance: uniform`, which is the same everywhere and of every model"
            self.refuse_ignored(("control", "balance", "prior_from"), same)
        if self.importance.name == "random":
            self.refuse_ignored(
                ("prior_from",), "with `importance: random`, which is the same of every model"
            )
        changed: dict[str, Any] = {"merge": self.merge or default_merge(self.kind)}
        if self.kind == "inputs" and self.others is None:
            changed["others"] = FisherOptions()
        if isinstance(self.mechanism, AnchorOptions):
            try:
                changed["mechanism"] = self.mechanism.resolved(self.kind)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        self.__dict__.update(changed)  # the model is frozen, and not yet anybody's
        return self

    def completed(self, lora: bool) -> AttributionStrategyOptions:
        """With the default in place that depends on whether a LoRA is trained."""
        if not isinstance(self.mechanism, AnchorOptions):
            return self
        return self.model_copy(update={"mechanism": self.mechanism.resolved(self.kind, lora)})


@register
class Attribution(Strategy):
    """A, section 4.2, with every part a choice.

    Each task's prior (of the model that learned it, or of one of its own) is joined with the earlier ones
    (eq. 12), put under the control, and handed to the mechanism for the next task. A's own choices are in
    ``configs/attribution_paper.yaml``; eq. 13's factor on a gradient cancels under Adam. What a
    user who says nothing gets is what kept most (docs/results.md): the inputs where relevance went, anchored.
    """

    name = "attribution"
    paper = "Liu et al. 2026, arXiv 2605.05285"
    summary = "holds the inputs where relevance went; any other importance, mechanism and control"
    Options = AttributionStrategyOptions
    sharded = True
    state = "constant"
    ends_untrained = True

    def __init__(self, options: AttributionStrategyOptions) -> None:
        super().__init__(options)
        self.prior: ImportancePrior | None = None
        self._held: ImportancePrior | None = None  # the prior, or its control
        self._protection: Protection | None = None
        self._handle = Handle()
        self._merged: Merged | None = None  # a LoRA for each task; None: what is trained is held as it is
        self._beside = Beside(options.others) if isinstance(options.others, Options) else None
        self._under: dict[str, Tensor] = {}  # with `weights`, what all LoRAs so far were added to

    def check(self, model: nn.Module) -> None:
        """Take the initial prior, if one is given, and see that it fits; choose what becomes of LoRA."""
        self._check_choices(model)
        if self.options.kind == "inputs":
            form = form_for(model, self.options.merge_lora, self.options.name)
            self._merged = None if form is None else Merged(model, form)
            self.changes_base = form == "weights"
        if self.options.initial_prior is None:
            return
        try:
            prior = ImportancePrior.load(self.options.initial_prior)
            if self._merged is not None and prior.kind == "inputs":
                prior = of_whole_maps(prior, model)
            prior.check_fits(model)
            if prior.kind != self.options.kind:
                raise PriorMismatchError(
                    f"it is of the kind '{prior.kind}', and strategy.importance makes '{self.options.kind}'; "
                    f"they can't be joined. Compute it with `--importance {self.options.importance.name}`."
                )
        except HoldfastError as error:
            raise type(error)(f"strategy.initial_prior: {error}") from error
        rank = getattr(self.options.importance, "rank", None)
        prior = prior if rank is None else prior.leading(rank)  # a sum with a whole moment is whole
        self.prior = prior.mean_normalised() if self.options.balance else prior

    def _check_choices(self, model: nn.Module) -> None:
        """See that what is chosen for LoRA, and for other weights than linear maps, has some to act on."""
        if self.options.merge_lora == "none" and not is_adapted(model):
            raise ConfigError(
                "strategy.merge_lora: none does nothing here, as this model has no LoRA; leave it out."
            )
        others: Any = self.options.others
        if others not in (None, "none", FisherOptions()) and not self._left(model):
            raise ConfigError(
                f"strategy.others: {others.name} does nothing here: of what is trained it rates nothing that "
                "isn't rated by its inputs already. Leave it out."
            )

    def _left(self, model: nn.Module) -> list[nn.Parameter]:
        """What is trained beside linear maps, and rated by `others`; where nothing is to be, by fisher."""
        dims = input_dims(model)
        maps = ImportancePrior({n: p.data for n, p in block_parameters(model).items() if n in dims})
        every = FisherOptions() if self._beside is None else self._beside.options
        return list(left_to_rate(model, every, maps).values())

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The prior, and what acts on it; and the models of one task each."""
        alone = [(len(task.train), None) for task in stream if self.options.prior_from == "single_task"]
        costs = prior_costs(model, self.options.importance)
        if self.options.kind == "inputs":
            left = self._left(model)
            if self._beside is not None:
                costs += prior_costs(model, self._beside.options, weights=left)
            elif left:
                free = f"{sum(p.numel() for p in left):,} trained parameters are no linear maps"
                costs[0] = costs[0]._replace(note=f"{free} and not held; strategy.others=fisher holds them.")
            form = form_for(model, self.options.merge_lora, self.options.name)
            if form == "adapters":
                costs.append(grown_cost(model, len(stream) - 1))
        return Estimate(costs, further=alone)

    def prepare(self, context: Context) -> None:
        """Know the weights that LoRAs are added to."""
        if self.changes_base:
            self._under = dict(under_adapter(context.model))

    def begin(self, context: Context, stage: Stage) -> None:
        """Build the protection; its reference is the weights that this stage starts from."""
        self._protection, self._held = None, None
        if stage.first:
            context.check_rateable(stage.tasks[0], self.options.importance, whole=self._merged is not None)
        if self.prior is not None:
            self._held = apply_control(self.prior, self.options.control, seed=context.seed)
        if self._merged is not None:
            pull = getattr(self.options.mechanism, "pull", None)
            pull = LORA_PULL if pull is None else pull  # of another mechanism, or in another unit
            self._merged.begin(context.model, stage.index, context.seed, self._held, pull)
        if self._held is not None:
            prior = self._held if self._merged is None else held_rows(self._held, context.model)
            reference = weights_of(context.model, prior.tensors)
            if self._beside is not None:
                prior = self._beside.begin(context.model, self.options.control, context.seed, prior)
            self._protection = build_mechanism(self.options.mechanism, prior, reference)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Hold the weights from the first step on."""
        with together() as handles:
            if self._merged is not None:
                handles += self._merged.attach(model, optimizer, self._protection, self._held)
            elif self._protection is not None:
                handles.append(self._protection.attach(model, optimizer))
            if handles:
                self._handle = handles[0]
            if self._beside is not None:
                handles += self._beside.attach(model, optimizer)
        return handles

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
        prior = context.importance(task, self.options.importance, model, whole=self._merged is not None)
        if self._beside is not None:
            self._beside.end(context, task, model, prior)
        if self._merged is not None:
            self._merged.summary().write(context.folder / "adapters.json")
            self._merged.end(context.model)
        prior = prior.mean_normalised() if self.options.balance else prior
        self.prior = prior if self.prior is None else self.prior.merge(prior, how=self.options.merge)

    def export(self, context: Context, folder: Path) -> None:
        """Weights, or a PEFT adapter; with LoRAs added to the weights these."""
        if self.changes_base:
            export_merged(context.model, context.tokenizer, folder)
        else:
            super().export(context, folder)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The joined prior; and the weights that LoRAs were added to."""
        tensors = {f"{_UNDER}{name}": weight.detach() for name, weight in self._under.items()}
        values: dict[str, Any] = {}
        if self.prior is not None:
            tensors, values = {**self.prior.tensors, **tensors}, dict(self.prior.meta)
        others, of_others = ({}, {}) if self._beside is None else self._beside.state_dict()
        if others:
            values[_BESIDE] = of_others
            tensors |= {f"{_BESIDE}.{name}": tensor for name, tensor in others.items()}
        return tensors, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        rest, meta = dict(tensors), dict(values)
        under = _taken(rest, _UNDER)
        with torch.no_grad():
            for name, weight in under.items():
                self._under.setdefault(name, weight).copy_(weight)
        others, of_others = _taken(rest, f"{_BESIDE}."), meta.pop(_BESIDE, {})
        if self._beside is not None:
            self._beside.load_state_dict(others, of_others)
        if rest:
            self.prior = ImportancePrior(rest, meta)


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it; they are taken out."""
    return {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
