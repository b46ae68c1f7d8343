"""What a learner is told: the sections that a run's configuration and ``holdfast learn`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from holdfast.config import MAX_SEED, Options, validate
from holdfast.errors import RunDirectoryError
from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.models import ModelOptions
from holdfast.strategies import STRATEGIES, StrategyOptions
from holdfast.tasks import Template
from holdfast.tasks.memory import RehearsalOptions
from holdfast.training.options import TrainingOptions

CONFIG = "config.yaml"  # in a learner's folder: what it was told
STAGES = "tasks"  # there: what it learned


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
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)

    @model_validator(mode="after")
    def _one_memory(self) -> LearnerConfig:
        if self.replay is not None and _memory_of(self.strategy) != "none":
            raise ValueError(
                f"`replay:` doesn't combine with `strategy: {self.strategy.name}`, which sees examples of "
                "earlier tasks by itself; leave out one of the two"
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

    @property
    def memory(self) -> Literal["none", "kept", "generated"]:
        """What is trained on for earlier tasks' sake: nothing, examples of theirs, or the model's own."""
        return _memory_of(self.strategy if self.replay is None else self.replay)

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
        if getattr(options, "control", "none") != "none":
            parts.append(options.control)
        if self.replay is not None:
            parts.append("replay")
        if self.memory == "generated" and not STRATEGIES[options.name].writes:
            parts[-1 if self.replay is not None else len(parts) :] = ["generated memory"]
        return " · ".join(parts)


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
        recorded = yaml.safe_load((path / CONFIG).read_text())
        values = {key: value for key, value in recorded.items() if key in LearnerConfig.model_fields}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise RunDirectoryError(f"{path / CONFIG}: can't be read ({error}).") from error
    return validate(LearnerConfig, {**values, **sections}, str(path / CONFIG))


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
