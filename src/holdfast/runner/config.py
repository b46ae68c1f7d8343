"""The whole configuration of a run: what its learner is told, and the stream of tasks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from holdfast.config import override, read_yaml, validate
from holdfast.errors import ConfigError
from holdfast.learner.config import LearnerConfig, LearnerEvaluationOptions
from holdfast.models import ModelOptions
from holdfast.places import Output
from holdfast.tasks import TasksOptions

Scope = Literal["all", "seen", "needed", "last"]


class RunEvaluationOptions(LearnerEvaluationOptions):
    """The same, and which tasks of a known stream are asked when."""

    scope: Scope = Field(
        "all",
        description="which tasks after each stage. all: every one; seen: those learned so far (no FWT); "
        "needed: what AP, FWT, BWT and learning accuracy need, those just learned and the next (half the "
        "time on four tasks; gaps in the matrix); last: none but after the last stage, so AP alone",
    )
    zero_shot: bool = Field(True, description="score every task before any training (row 0 of the matrix)")


class RunConfig(LearnerConfig):
    """One run: a model learns a task stream under a strategy."""

    output: Output = Field(
        description="run directory; a run started again with the same config continues there"
    )
    label: str | None = Field(None, description="how the run is called in tables; default: the strategy")
    model: ModelOptions
    tasks: TasksOptions
    evaluation: RunEvaluationOptions = Field(default_factory=RunEvaluationOptions)

    @property
    def title(self) -> str:
        """The label, or what distinguishes the strategy."""
        return self.label or self.method


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
    if {"base", "rows"} <= data.keys():
        raise ConfigError(
            f"{path}: a grid (it has base and rows), for `holdfast compare`; give a run's config."
        )
    data.setdefault("output", f"runs/{path.stem}")
    return validate(RunConfig, data, source=str(path))
