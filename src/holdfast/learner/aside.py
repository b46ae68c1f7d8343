"""Another training beside a task's own, which a strategy asks for: on other rows, or of another model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from holdfast import world
from holdfast.folder import CHECKPOINTS
from holdfast.learner.state import LearnerState
from holdfast.tasks.task import Example
from holdfast.training.loop import train
from holdfast.training.verbs import Verbs


def fit_aside(
    state: LearnerState,
    model: Any,
    examples: Sequence[Example],
    description: str,
    verbs: Verbs | None = None,
    epochs: float | None = None,
) -> None:
    """Train with the learner's options; what `Context.fit` is. It is not resumed: its stage is redone."""
    options, context = state.config.training, state.context
    if epochs is not None:
        options = options.model_copy(update={"epochs": epochs, "max_steps": None})
    folder = state.folder.path / "aside"
    world.first(lambda: shutil.rmtree(folder, ignore_errors=True))
    train(
        model,
        context.encoder.many(examples),
        options,
        tokenizer=context.tokenizer,
        folder=folder / CHECKPOINTS,
        seed=state.config.seed,
        verbs=verbs,
        base=state.base,
        progress=context.progress,
        description=description,
    )
    world.first(lambda: shutil.rmtree(folder, ignore_errors=True))
