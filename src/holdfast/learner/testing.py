"""The rows kept aside of tasks, asked after each: encoded once, answers as long as when they were new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from holdfast.evaluation.evaluate import EncodedTask, encode_task, evaluate_encoded
from holdfast.evaluation.predictions import write_predictions
from holdfast.learner.state import LearnerState
from holdfast.tasks.task import Task


class Testing:
    """Asks a learner the rows kept aside of its tasks.

    Parameters
    ----------
    state : LearnerState
    """

    def __init__(self, state: LearnerState) -> None:
        self.state = state
        self._encoded: dict[str, EncodedTask] = {}
        self._longest: dict[str, int] = {}  # how long an answer to each may be, in tokens

    def begin(self, task: Task) -> int:
        """Encode the rows of a task that is about to be learned; how long its answers may be, in tokens."""
        if task.test:
            found = encode_task(task, self.state.context.encoder, self.state.config.evaluation)
            self._encoded[task.name], self._longest[task.name] = found, found.max_new_tokens
        return self.longest(task.name)

    def recall(self, task: str, longest: int) -> None:
        """Know again what `begin` said of a task that was learned in another process."""
        self._longest[task] = longest

    def longest(self, task: str) -> int:
        """How long an answer to a task may be, in tokens; 0 where nobody has said."""
        return self._longest.get(task, 0)

    def ask(self, tasks: Sequence[Task], folder: Path, description: str = "") -> dict[str, float]:
        """Ask the model as it stands; predictions go into a folder.

        Returns
        -------
        dict
            Task to score, 0 to 100.
        """
        scores: dict[str, float] = {}
        context = self.state.context
        with context.progress.bar(f"test {description}", total=sum(len(t.test) for t in tasks)) as bar:
            done = 0
            for task in tasks:
                result = evaluate_encoded(
                    self.state.route(task.name),
                    context.tokenizer,
                    self._encoded_of(task),
                    batch_size=self.state.config.evaluation.batch_size,
                    progress=partial(_ahead, bar, done),
                )
                write_predictions(folder, task.name, result.predictions)
                scores[task.name] = result.score
                done += len(task.test)
        return scores

    def _encoded_of(self, task: Task) -> EncodedTask:
        if task.name not in self._encoded:
            options = self.state.config.evaluation
            if options.max_new_tokens is None and (longest := self.longest(task.name)):
                options = options.model_copy(update={"max_new_tokens": longest})
            self._encoded[task.name] = encode_task(task, self.state.context.encoder, options)
        return self._encoded[task.name]


def _ahead(bar: Callable[[int], None], before: int, done: int, total: int) -> None:
    """Rows asked of one task, on the bar of them all."""
    bar(before + done)
