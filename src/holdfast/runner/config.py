"""The whole configuration of a run: the sections that the parts declare, in one typed model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from holdfast.config import MAX_SEED, Options, override, read_yaml, validate
from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.models import ModelOptions
from holdfast.strategies import STRATEGIES, StrategyOptions
from holdfast.tasks import TasksOptions, Template
from holdfast.tasks.memory import RehearsalOptions
from holdfast.training.options import TrainingOptions


class RunConfig(Options):
    """One run: a model learns a task stream under a strategy."""

    output: str = Field(description="run directory; a run started again with the same config continues there")
    label: str | None = Field(None, description="how the run is called in tables; default: the strategy")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    threads: int | None = Field(None, ge=1, description="CPU threads; results are reproducible per number")
    model: ModelOptions
    tasks: TasksOptions
    template: Template = Field(default_factory=Template)
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    strategy: StrategyOptions
    replay: RehearsalOptions | None = Field(
        None, description="mix kept examples of earlier tasks into what the strategy trains on"
    )
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)

    @model_validator(mode="after")
    def _one_memory(self) -> RunConfig:
        if self.replay is not None and self._strategy_rehearses:
            raise ValueError(
                f"`replay:` doesn't combine with `strategy: {self.strategy.name}`, which sees examples of "
                "earlier tasks by itself; leave out one of the two"
            )
        return self

    @property
    def _strategy_rehearses(self) -> bool:
        options: Any = self.strategy
        return getattr(options, "memory", None) is not None or not STRATEGIES[options.name].rehearsal_free

    @property
    def rehearses(self) -> bool:
        """Whether examples of earlier tasks are trained on again."""
        return self.replay is not None or self._strategy_rehearses

    @property
    def title(self) -> str:
        """The label, or what distinguishes the strategy."""
        if self.label:
            return self.label
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
        return " · ".join(parts)


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``key=value`` overrides, and validate.

    Relative paths inside are taken from the working directory, as in a shell. `output` defaults to
    ``runs/<name of the file>``.

    Raises
    ------
    ConfigError
        With every problem at once.
    """
    data = override(read_yaml(path), overrides)
    data.setdefault("output", f"runs/{path.stem}")
    return validate(RunConfig, data, source=str(path))
