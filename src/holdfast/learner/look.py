"""What can't be asked of tasks, and what their rows lose on their way: told once, before any training."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.errors import DataError
from holdfast.evaluation.audit import require_sound
from holdfast.learner.askable import check_askable
from holdfast.learner.state import LearnerState
from holdfast.tasks.options import trained_on
from holdfast.tasks.task import Example, Task


class Look:
    """Looks at each task once; its rows stay encoded until it is learned.

    Parameters
    ----------
    state : LearnerState
    """

    def __init__(self, state: LearnerState) -> None:
        self.state = state
        self._seen: dict[int, tuple[Task, list[Example]]] = {}  # by identity, and their rows

    def __call__(self, tasks: Iterable[Task]) -> None:
        """Tell (`Progress.remark`) what is cut, what can't be answered, and which test rows are trained on.

        Raises
        ------
        DataError
            Rows can't be encoded, don't fit the model, can't be scored, or aren't what the strategy can
            learn behind what it has.
        ConfigError, ModelError
            lm-eval or vLLM shall ask, and can't (`check_askable`).
        """
        problems, tasks = list[str](), list(tasks)
        if any(id(task) not in self._seen for task in tasks):
            check_askable(self.state.config, self.state.model, self.state.context.tokenizer)
            if self.state.rehearsal is not None:
                self.state.rehearsal.check()
        before, new = [*self.state.tests], dict[int, Task]()
        for task in tasks:
            before.append(task)
            if id(task) in self._seen or id(task) in new:
                continue
            new[id(task)] = task
            try:
                self.at(task, self.state.config.writes)
            except DataError as error:
                problems.append(str(error))
            for remark in trained_on(before, task):
                self.state.context.progress.remark(remark)
        if problems:
            raise DataError("\n".join(problems))
        self.state.strategy.check_tasks(list(new.values()), self.state.context.encoder)
        self._seen |= {key: (task, [*task.train, *task.test]) for key, task in new.items()}

    def at(self, task: Task, written: bool = False) -> None:
        """Look at one task's rows alone (`written`: see `audit`).

        Raises
        ------
        DataError
            As of all of them.
        """
        context, options = self.state.context, self.state.config.evaluation
        with context.progress.bar(f"read {task.name}", total=len(task.train)) as bar:
            tell = context.progress.remark
            require_sound(task, context.encoder, context.model, options, tell, bar, written)

    def learned(self, tasks: Iterable[Task]) -> None:
        """Let go of the encoded rows of tasks, and of all others that aren't waited for."""
        for task in tasks:
            self._seen.pop(id(task), None)
        self.state.context.encoder.forget(but=(row for _, rows in self._seen.values() for row in rows))
