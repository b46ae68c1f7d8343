"""Rows of a task that are kept to be replayed: written by the model, or those of its own that surprise it."""

from __future__ import annotations

from holdfast.evaluation.surprise import most_surprising, surprises
from holdfast.evaluation.writing import write_rows
from holdfast.folder import CHECKPOINTS
from holdfast.learner.base_task import BASE
from holdfast.learner.state import LearnerState
from holdfast.tasks.memory import MemoryOptions, WritingOptions
from holdfast.tasks.opening import opening_of
from holdfast.tasks.options import subsample
from holdfast.tasks.task import Example, Task


def rows_to_keep(state: LearnerState, task: Task, options: MemoryOptions) -> list[Example]:
    """Rows that the model writes of a task it has just learned; what `Context.write` is.

    They are kept as text in the stage's folder. Those of the base it has written already, or were given. By
    surprise: those of the task's own that it finds least likely now.
    """
    config, context = state.config, state.context
    size, encoder = config.evaluation.batch_size, context.encoder
    if task.name == BASE and config.protect_base is not None:
        count = options.written if options.generated else options.size(len(task.train))
        return list(subsample(task.train, count, config.seed, BASE, "memory"))
    if options.sampling == "surprise":
        with context.progress.bar(f"surprise of {task.name}", total=len(task.train)) as bar:
            found = surprises(state.route(task.name), encoder, task.train, batch_size=size, progress=bar)
        return most_surprising(task.train, found, options.size(len(task.train)))
    with context.progress.bar(f"write rows of {task.name}", total=options.written) as bar:
        written = write_rows(
            state.route(task.name),
            encoder,
            opening_of(task.train, encoder, task.name),
            options.writing or WritingOptions(),
            count=options.written,
            seed=f"{config.seed} {task.name}",
            known=task.train,
            batch_size=size,
            progress=bar,
            kept=context.folder / CHECKPOINTS,
        )
    written.save(context.folder)
    context.progress.say(f"  memory of {task.name}: {written.said()}")
    return written.rows
