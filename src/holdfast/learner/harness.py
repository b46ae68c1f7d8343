"""lm-eval on a learner: before the first task that it is asked for, and after each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from holdfast.evaluation.harness import HarnessOptions, Results, run_harness
from holdfast.learner.asked import way_of
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
        """Ask the model before the stage what it was not asked after the last one; the seconds."""
        new = self._new()
        if new is None:
            return {}
        started = time.perf_counter()
        file, options = self.folder / BEFORE, new.model_dump(mode="json")
        known = json.loads(file.read_text()) if file.is_file() else {}
        if known.get("options") != options:  # none, or a killed attempt was to ask something else
            known = {"options": options, "scores": self._ask(new)}
            write_json(file, known)
        self._before = known["scores"]
        return {"harness": time.perf_counter() - started}

    def measured(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Ask the model as it stands: ``harness``, and ``harness_before``, for the stage's metrics."""
        if self.options is None:
            return {}
        started = time.perf_counter()
        found = {"harness": self._ask(self.options), "harness_before": self._before}
        seconds["harness"] = seconds.get("harness", 0.0) + time.perf_counter() - started
        return {**found, "harness_options": self.options.model_dump(mode="json")}

    def _ask(self, options: HarnessOptions) -> Results:
        return run_harness(self.state.route(), self.state.context.tokenizer, options)

    def _new(self) -> HarnessOptions | None:
        """What is to be asked after this stage and was not after the last one, in the same way."""
        parts = self.state.folder.parts(STAGES)
        if self.options is None or not parts:
            return self.options
        last = StageMetrics.read(self.state.folder.path / parts[-1] / "metrics.json")
        if not last.harness:
            return self.options
        known = set(last.harness_options.get("tasks", last.harness))
        if last.harness_options and way_of(last.harness_options) != way_of(self.options.model_dump()):
            known = set()
        new = tuple(task for task in self.options.tasks if task not in known)
        return self.options.model_copy(update={"tasks": new}) if new else None
