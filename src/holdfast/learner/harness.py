"""lm-eval on a learner: before the first task that it is asked for, and after each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from holdfast.evaluation.harness import Results, run_harness
from holdfast.learner.config import STAGES
from holdfast.learner.state import LearnerState
from holdfast.records import StageMetrics
from holdfast.storage import write_json

BEFORE = "harness_before.json"  # in a stage's folder: so that a killed one doesn't ask again


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
