"""What a learner is told: the sections that a run's configuration and ``holdfast learn`` have in common."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from holdfast.config import MAX_SEED, Options, named, read_recorded, validate
from holdfast.errors import RunDirectoryError
from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.evaluation.harness import HarnessOptions, named_tasks
from holdfast.evaluation.vllm_engine import EngineOptions
from holdfast.folder import CONFIG
from holdfast.importance.inputs import InputsOptions
from holdfast.models import ModelOptions
from holdfast.places import Input, near
from holdfast.strategies import STRATEGIES, StrategyOptions
from holdfast.tasks import Template
from holdfast.tasks.memory import RehearsalOptions, WritingOptions
from holdfast.training.options import TrainingOptions

STAGES = "tasks"  # there: what it learned


class ProtectBaseOptions(Options):
    """Task 0 is the base: what it can do is held from the first task on; ``true`` for the defaults."""

    rows: int = Field(
        256, ge=1, description="how many rows the base writes, or at most are taken of `general`"
    )
    general: Input | None = Field(
        None, description="a file of text or chats instead, such as one data set of many uses"
    )
    tokens: int = Field(
        128,
        ge=2,
        description="the most that a user's turn, and an answer, may have; without a chat template, a text",
    )
    writing: WritingOptions | None = Field(None, description="how rows are written, and which are left out")
    optional: bool = Field(
        False, description="go on, and say so, where nothing that is written can be used, instead of stopping"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> ProtectBaseOptions:
        if self.general is not None and self.writing is not None:
            raise ValueError(
                "`writing` doesn't apply to rows of a file (`general`); leave out one of the two"
            )
        if self.general is not None:
            self.refuse_ignored(("tokens",), "to rows of a file (`general`), which the template cuts")
        return self


class LearnerEvaluationOptions(EvaluationOptions):
    """How a model is asked, and what of it is measured after each task."""

    general: bool = Field(
        False,
        description="measure KL(base || now) after each task, on rows that the base writes itself at the "
        "start and on the new task's rows",
    )
    general_rows: int = Field(64, ge=1, description="how many rows of each kind that is measured on")
    engine: Annotated[EngineOptions, BeforeValidator(named)] = Field(
        default_factory=EngineOptions,
        description="what generates the answers to test rows: this process, or `vllm` in one of its own",
    )
    harness: Annotated[HarnessOptions | None, BeforeValidator(named_tasks)] = Field(
        None, description="tasks of EleutherAI's lm-eval, asked before the first task and after each"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> LearnerEvaluationOptions:
        if not self.general:
            self.refuse_ignored(("general_rows",), "without `general: true`")
        return self


def _switched(value: Any) -> Any:
    """``protect_base: true`` for the defaults, ``false`` for none."""
    return ({} if value else None) if isinstance(value, bool) else value


class LearnerConfig(Options):
    """A model, and the strategy under which it learns one task after another."""

    seed: int = Field(0, ge=0, le=MAX_SEED)
    threads: int | None = Field(None, ge=1, description="CPU threads; results are reproducible per number")
    model: ModelOptions | None = Field(None, description="none: the model was made in a script")
    template: Template = Field(default_factory=Template)
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    strategy: StrategyOptions
    replay: RehearsalOptions | None = Field(
        None,
        description="mix examples of earlier tasks, kept or written by the model, into what the strategy "
        "trains on",
    )
    protect_base: Annotated[ProtectBaseOptions | None, BeforeValidator(_switched)] = Field(
        None,
        description="true: before the first task the base writes rows of its own, and is held by them like a "
        "task that was learned",
    )
    evaluation: LearnerEvaluationOptions = Field(default_factory=LearnerEvaluationOptions)
    keep: Literal["all", "last"] = Field(
        "all",
        description="on disk. last: of all tasks but the last two the weights, priors and states are deleted "
        "(scores, answers and records stay), so that a folder doesn't grow by a model with each task; no "
        "further back than to the last but one can then be gone",
    )

    @model_validator(mode="after")
    def _base_can_be_held(self) -> LearnerConfig:
        if self.protect_base is None:
            return self
        if why := cannot_hold_base(self.strategy, self.replay):
            raise ValueError(f"`protect_base` doesn't combine with {why}")
        return self

    @model_validator(mode="after")
    def _one_memory(self) -> LearnerConfig:
        if self.replay is not None and _memory_of(self.strategy) != "none":
            raise ValueError(
                f"`replay:` doesn't combine with `strategy: {self.strategy.name}`, which sees examples of "
                "earlier tasks by itself; leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _its_optimizer(self) -> LearnerConfig:
        wanted, given = STRATEGIES[self.strategy.name].strategy.optimizer, self.training.optimizer
        if wanted is not None and given != wanted:
            raise ValueError(
                f"`training.optimizer: {given}` doesn't combine with `strategy: {self.strategy.name}`, which "
                f"looks at the state of {wanted}; use `optimizer: {wanted}`"
            )
        return self

    @model_validator(mode="after")
    def _whole_samples(self) -> LearnerConfig:
        order = getattr(getattr(self.strategy, "sensitivity", None), "order", None)
        weight = self.training.lm_weight
        if order == "second" and (weight or (weight is None and self.memory == "generated")):
            raise ValueError(
                "`sensitivity: second` takes gradients of single samples' answers apart, and prompts are "
                "learned beside them (training.lm_weight); take `first` or `second-batch`, or lm_weight 0"
            )
        return self

    @model_validator(mode="after")
    def _one_loss(self) -> LearnerConfig:
        targets = getattr(self.strategy if self.replay is None else self.replay, "targets", "text")
        if targets == "logits" and self.training.trainer == "sft":
            raise ValueError(
                "`targets: logits` of a memory doesn't combine with `training.trainer: sft`, which has a "
                "loss of its own; use `trainer: auto`"
            )
        if targets == "logits" and not STRATEGIES[self.strategy.name].strategy.begins_as_before:
            raise ValueError(
                f"`targets: logits` of a memory doesn't combine with `strategy: {self.strategy.name}`, under "
                "which a task doesn't begin with the model as it was before; use `targets: text`"
            )
        return self

    @model_validator(mode="after")
    def _complete(self) -> LearnerConfig:
        """Fill in what depends on the model, so that a recorded configuration is complete."""
        if self.model is not None:
            self.__dict__["strategy"] = _completed(self.strategy, self.model.adapted)
        return self

    def for_adapted(self, lora: bool) -> LearnerConfig:
        """The same where the model was made in a script: with a LoRA, or without."""
        return self.model_copy(update={"strategy": _completed(self.strategy, lora)})

    @property
    def memory(self) -> Literal["none", "kept", "generated"]:
        """What is trained on for earlier tasks' sake: nothing, examples of theirs, or the model's own."""
        return _memory_of(self.strategy if self.replay is None else self.replay)

    @property
    def writes(self) -> bool:
        """Whether a model is to write rows of each task later."""
        return self.memory == "generated" or STRATEGIES[self.strategy.name].strategy.in_context

    @property
    def rehearses(self) -> bool:
        """Whether examples of earlier tasks are trained on again."""
        return self.memory == "kept"

    @property
    def method(self) -> str:
        """What distinguishes the strategy, in a few words."""
        options: Any = self.strategy
        parts = [options.name]
        for key in ("importance", "mechanism"):
            choice = getattr(options, key, None)
            if choice is not None:
                parts.append(choice.name)
        parts += self._controls()
        if self.replay is not None:
            parts.append("replay")
        if self.memory == "generated" and not STRATEGIES[options.name].writes:
            parts[-1 if self.replay is not None else len(parts) :] = ["generated memory"]
        return " · ".join(parts)

    def _controls(self) -> list[str]:
        """What of the method's own parts is taken away: runs of another name are another method in tables."""
        strategy: Any = self.strategy
        importance = getattr(strategy, "importance", None)
        found = [getattr(strategy, "control", "none"), getattr(importance, "control", "none")]
        if isinstance(importance, InputsOptions):
            if importance.weighting != InputsOptions().weighting:
                found.append(importance.weighting)
            if getattr(strategy.mechanism, "coordinates", None) == "weights":
                found.append("coordinates weights")
            if getattr(strategy, "merge_lora", None) == "none" and self.model and self.model.lora:
                found.append("one LoRA")
        return [control for control in found if control != "none"]


def cannot_hold_base(strategy: Any, replay: RehearsalOptions | None) -> str:
    """Why a strategy and a memory can do nothing for the base; "" where they can."""
    if getattr(strategy, "prior_from", None) == "single_task":
        return "`prior_from: single_task`: the base is no task that a model could be trained on alone"
    if STRATEGIES[strategy.name].ends_untrained or replay is not None:
        return ""
    able = ", ".join(sorted(name for name, method in STRATEGIES.items() if method.ends_untrained))
    return (
        f"`strategy: {strategy.name}`, which holds nothing that it did not train; allowed: {able}, or any "
        "with a `replay:` section"
    )


def _completed(options: Any, lora: bool) -> Any:
    return options.completed(lora) if hasattr(options, "completed") else options


def require_learner(path: Path) -> None:
    """See that a folder is a learner's.

    Raises
    ------
    RunDirectoryError
        It isn't.
    """
    if not (path / CONFIG).is_file():
        learn = f"holdfast learn DATA --skills {shlex.quote(str(path))} --model MODEL"
        raise RunDirectoryError(
            f"{path}: there is no learner here (no {CONFIG}).{'' if path.exists() else near(path)} "
            f"`{learn}` makes one, or holdfast.Learner(model, tokenizer, folder=...)."
        )


def recorded_config(path: Path, sections: Mapping[str, Any]) -> LearnerConfig:
    """What a learner's folder, or a run's, says of its learner.

    Raises
    ------
    RunDirectoryError
        The file is damaged.
    ConfigError
        `sections` are wrong.
    """
    try:
        recorded = read_recorded(path / CONFIG)
        values = _known(LearnerConfig, recorded)
        if "evaluation" in values:
            values["evaluation"] = _known(LearnerEvaluationOptions, values["evaluation"])
    except AttributeError as error:
        raise RunDirectoryError(f"{path / CONFIG}: can't be read ({error}).") from error
    return validate(LearnerConfig, {**values, **sections}, str(path / CONFIG))


def _known(section: type[Options], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a learner has of it: a run has more."""
    return {key: value for key, value in recorded.items() if key in section.model_fields}


def _memory_of(options: Any) -> Literal["none", "kept", "generated"]:
    """Of a strategy's options, or of a ``replay:`` section."""
    memory = getattr(options, "memory", None)
    if memory is not None:
        if memory.sampling == "none":
            return "none"
        return "generated" if memory.generated else "kept"
    name = getattr(options, "name", None)
    if name is not None and STRATEGIES[name].writes:
        return "generated"
    return "none" if name is None or STRATEGIES[name].rehearsal_free else "kept"
