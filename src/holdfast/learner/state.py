"""What a learner carries from task to task; its parts work on it, and none of them sees the learner."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from holdfast.folder import Folder
from holdfast.learner.config import LearnerConfig
from holdfast.models.base import Base
from holdfast.storage import write_json, write_tensors
from holdfast.strategies import Context, Strategy
from holdfast.tasks.memory import Rehearsal
from holdfast.tasks.task import Task

_TENSORS, _VALUES, _MEMORY = "strategy.safetensors", "strategy.json", "replay.json"


@dataclass
class LearnerState:
    """A learner's model, method and memory, and the folder that they are kept in.

    Attributes
    ----------
    replay : Rehearsal, optional
        What ``replay:`` asks for beside the strategy.
    base : Base
        The model as it was before the first task.
    learned : list of str
        The names of the tasks learned so far, in order.
    tests : list of Task
        Those learned in stages of their own, with the rows kept aside for testing them.
    digests : dict
        Of the rows that these were learned from, by task.
    """

    config: LearnerConfig
    folder: Folder
    context: Context
    strategy: Strategy
    replay: Rehearsal | None
    base: Base
    learned: list[str] = field(default_factory=list)
    tests: list[Task] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The model as it stands now; a strategy may have wrapped it."""
        return self.context.model

    @property
    def rehearsal(self) -> Rehearsal | None:
        """What is trained on again of earlier tasks: of ``replay:``, or else of the strategy."""
        return self.replay or self.strategy.rehearsal

    def route(self, task: str | None = None) -> Any:
        """The model that answers, see `Learner.route`."""
        return self.strategy.route(self.model, task if self.strategy.needs_task_identity else None)

    def write_strategy(self, folder: Path) -> dict[str, Tensor]:
        """Write what the strategy knows into a stage's folder; its tensors are returned."""
        tensors, values = self.strategy.state_dict()
        if tensors:
            write_tensors(folder / _TENSORS, tensors)
        write_json(folder / _VALUES, values)
        return dict(tensors)

    def has_strategy(self, folder: Path) -> bool:
        """Whether `write_strategy` has written there."""
        return (folder / _VALUES).is_file()

    def read_strategy(self, folder: Path) -> None:
        """Let the strategy know what `write_strategy` wrote."""
        tensors = load_file(folder / _TENSORS) if (folder / _TENSORS).exists() else {}
        self.strategy.load_state_dict(tensors, json.loads((folder / _VALUES).read_text(encoding="utf-8")))

    def write_memory(self, folder: Path) -> None:
        """Write what is replayed into a stage's folder."""
        if self.replay is not None:
            write_json(folder / _MEMORY, self.replay.memory.state_dict())

    def read_memory(self, folder: Path) -> None:
        """Take back what `write_memory` wrote."""
        if self.replay is not None and (folder / _MEMORY).is_file():
            kept = (folder / _MEMORY).read_text(encoding="utf-8")
            self.replay.memory.load_state_dict(json.loads(kept))
