"""Continual fine-tuning of Hugging Face language models that keeps what they already know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.lazy import later

if TYPE_CHECKING:
    from holdfast.api import attribute, explain
    from holdfast.hold import Anchor, Gate, Penalty
    from holdfast.importance import ImportancePrior
    from holdfast.learner import Learner
    from holdfast.report import write_report
    from holdfast.runner import RunConfig, load_config, run
    from holdfast.tasks import Example, Task, TaskStream, toy_suite
    from holdfast.training.callback import ProtectCallback
    from holdfast.training.kl_callback import KLCallback

_HOME = {
    "Anchor": "holdfast.hold",
    "Example": "holdfast.tasks",
    "Gate": "holdfast.hold",
    "ImportancePrior": "holdfast.importance",
    "KLCallback": "holdfast.training.kl_callback",
    "Learner": "holdfast.learner",
    "Penalty": "holdfast.hold",
    "ProtectCallback": "holdfast.training.callback",
    "RunConfig": "holdfast.runner",
    "Task": "holdfast.tasks",
    "TaskStream": "holdfast.tasks",
    "attribute": "holdfast.api",
    "explain": "holdfast.api",
    "load_config": "holdfast.runner",
    "run": "holdfast.runner",
    "toy_suite": "holdfast.tasks",
    "write_report": "holdfast.report",
}
__all__ = [
    "Anchor",
    "Example",
    "Gate",
    "ImportancePrior",
    "KLCallback",
    "Learner",
    "Penalty",
    "ProtectCallback",
    "RunConfig",
    "Task",
    "TaskStream",
    "attribute",
    "explain",
    "load_config",
    "run",
    "toy_suite",
    "write_report",
]
__version__ = "0.1.0"

__getattr__ = later(__name__, _HOME)  # torch and transformers load only when something is used
