"""The rows kept aside of tasks, asked after each: encoded once, answers as long as when they were new."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from holdfast.evaluation.answers import Greedy, rooms_for_answers
from holdfast.evaluation.evaluate import EncodedTask, encode_task, evaluate_encoded
from holdfast.evaluation.predictions import write_predictions
from holdfast.evaluation.vllm_engine import Vllm
from holdfast.learner.askable import check_askable
from holdfast.learner.state import LearnerState
from holdfast.models import save_merged
from holdfast.models.adapters import is_adapter
from holdfast.tasks.task import Task

VLLM_LOG = "vllm.log"  # what it says, in the learner's folder
_WHOLE = ".asked-"  # begins the name of the folder that vLLM gets the model in


class Testing:
    """Asks a learner the rows kept aside of its tasks.

    Parameters
    ----------
    state : LearnerState
    """

    def __init__(self, state: LearnerState) -> None:
        self.state = state
        self._encoded: dict[str, tuple[Task, EncodedTask]] = {}  # of each name the rows asked last
        self._longest: dict[str, int] = {}  # how long an answer to each may be, in tokens

    def begin(self, task: Task) -> int:
        """Encode the rows of a task that is about to be learned; how long its answers may be, in tokens."""
        if task.test:
            found = encode_task(task, self.state.context.encoder, self.state.config.evaluation)
            self._encoded[task.name], self._longest[task.name] = (task, found), found.max_new_tokens
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
        context, total = self.state.context, sum(len(t.test) for t in tasks)
        with self._engine(tasks) as engine, context.progress.bar(f"test {description}", total=total) as bar:
            done = 0
            for task in tasks:
                result = evaluate_encoded(
                    self.state.route(task.name),
                    context.tokenizer,
                    self._encoded_of(task),
                    batch_size=self.state.config.evaluation.batch_size,
                    progress=partial(_ahead, bar, done),
                    engine=engine,
                )
                write_predictions(folder, task.name, result.predictions)
                scores[task.name] = result.score
                done += len(task.test)
        return scores

    @contextmanager
    def _engine(self, tasks: Sequence[Task]) -> Iterator[Greedy | None]:
        """What answers in the model's place, if another engine is asked for and answers are generated."""
        state, options = self.state, self.state.config.evaluation.engine
        encoded = map(self._encoded_of, tasks if options.name == "vllm" else ())
        asked = [e for e in encoded if e.max_new_tokens]
        if not asked:
            yield None
            return
        check_askable(state.config, state.model)  # of a folder that is only asked nobody has looked
        model, home = state.route(), state.folder.path
        longest = max(
            len(row.prompt_ids) + room
            for e in asked
            for row, room in zip(e.rows, rooms_for_answers(model, e.rows, e.max_new_tokens), strict=True)
        )
        for left in home.glob(f"{_WHOLE}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(dir=home, prefix=_WHOLE) as folder:
            self._write_whole(Path(folder))
            log = home / VLLM_LOG
            state.context.progress.say(f"  vLLM starts ({log})")
            with Vllm(Path(folder), options, dtype=model.dtype, longest=longest, log=log) as vllm:
                yield vllm.greedy

    def _write_whole(self, folder: Path) -> None:
        """The model that answers, with its adapter merged."""
        context = self.state.context
        self.state.strategy.export(context, folder)
        if is_adapter(str(folder)):
            shutil.rmtree(folder)
            save_merged(context.model, context.tokenizer, folder)

    def _encoded_of(self, task: Task) -> EncodedTask:
        known = self._encoded.get(task.name)
        if known is not None and _asks_the_same(known[0], task):
            return known[1]
        options = self.state.config.evaluation
        if options.max_new_tokens is None and (longest := self.longest(task.name)):
            options = options.model_copy(update={"max_new_tokens": longest})
        found = encode_task(task, self.state.context.encoder, options)
        self._encoded[task.name] = (task, found)
        return found


def _asks_the_same(a: Task, b: Task) -> bool:
    return a.metric == b.metric and a.options == b.options and (a.test is b.test or a.test == b.test)


def _ahead(bar: Callable[[int], None], before: int, done: int, total: int) -> None:
    """Rows asked of one task, on the bar of them all."""
    bar(before + done)
