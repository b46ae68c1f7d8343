"""lm-eval on a learner: before the first task that it is asked for, and after each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.evaluation.harness import Results, check_harness, run_harness
from holdfast.learner.config import STAGES, LearnerConfig
from holdfast.learner.state import LearnerState
from holdfast.records import StageMetrics
from holdfast.storage import write_json
from holdfast.strategies import STRATEGIES, Strategy

BEFORE = "harness_before.json"  # in a stage's folder: so that a killed one doesn't ask again


def check_askable(config: LearnerConfig) -> None:
    """See that lm-eval can ask what learns under this configuration, before anything is trained.

    Raises
    ------
    ConfigError
        lm-eval is missing or doesn't know a task, or the answers come from more than a plain model; or there
        are several processes.
    """
    if config.evaluation.harness is None:
        return
    if STRATEGIES[config.strategy.name].strategy.route is not Strategy.route:
        raise ConfigError(
            f"evaluation.harness: under strategy '{config.strategy.name}' answers come from more than a "
            "plain model (prompts, routers), which lm-eval can't ask. Leave evaluation.harness out, or take "
            "another strategy."
        )
    if world.size() > 1:
        raise ConfigError(
            "evaluation.harness: lm-eval shares questions out by itself where it finds several processes. "
            "Leave it out here, and ask with `holdfast harness FOLDER --tasks ...` afterwards."
        )
    check_harness(config.evaluation.harness)


class Harness:
    """What lm-eval says of one stage; nothing where ``evaluation.harness`` is not set.

    Parameters
    ----------
    folder : Path
        Of the stage.
    """

    def __init__(self, state: LearnerState, folder: Path) -> None:
        self.state, self.folder = state, folder
        self.options = state.config.evaluation.harness
        self._before: Results | None = None

    def begin(self) -> dict[str, float]:
        """Ask the model as it was before the stage, unless it was asked after an earlier one; the seconds."""
        if self.options is None or self._asked_earlier():
            return {}
        started = time.perf_counter()
        file = self.folder / BEFORE
        if not file.is_file():
            write_json(file, self._ask())
        self._before = json.loads(file.read_text())
        return {"harness": time.perf_counter() - started}

    def measured(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Ask the model as it stands: ``harness``, and ``harness_before``, for the stage's metrics."""
        if self.options is None:
            return {}
        started = time.perf_counter()
        found = {"harness": self._ask(), "harness_before": self._before}
        seconds["harness"] = seconds.get("harness", 0.0) + time.perf_counter() - started
        return found

    def _ask(self) -> Results:
        assert self.options is not None
        return run_harness(self.state.route(), self.state.context.tokenizer, self.options)

    def _asked_earlier(self) -> bool:
        parts = self.state.folder.parts(STAGES)
        if not parts:
            return False
        last = StageMetrics.read(self.state.folder.path / parts[-1] / "metrics.json")
        return bool(last.harness)
