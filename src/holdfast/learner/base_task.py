"""Task 0: what the base can do, from rows that it writes itself, ended like any other task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import torch

from holdfast.errors import ConfigError, DataError, RunDirectoryError
from holdfast.evaluation.writing import Written, write_rows
from holdfast.folder import CHECKPOINTS
from holdfast.learner.known import write_task
from holdfast.learner.look import Look
from holdfast.learner.state import LearnerState
from holdfast.models import load_weights, save_model
from holdfast.strategies import STRATEGIES, Stage
from holdfast.tasks import Encoder, load_task
from holdfast.tasks.memory import WritingOptions
from holdfast.tasks.opening import chat_opening, running
from holdfast.tasks.options import subsample
from holdfast.tasks.task import Example, Task

BASE = "base"  # the task's name, and its part of the folder


class BaseTask:
    """The base as the task before the first one: it is rated, remembered and shown, and never trained.

    The strategy is told as of any task (`begin`, then `end`, with index 0; those that follow count from 1),
    if it declares that it can end a task that was not trained; a ``replay:`` memory takes the rows in either
    case. What comes of it is one part of the folder, committed as a whole before the first task begins.
    """

    def __init__(self, state: LearnerState, look: Look) -> None:
        self.state, self.look, self.options = state, look, state.config.protect_base
        self.told = False  # whether the strategy has ended it

    @property
    def due(self) -> bool:
        """Whether it is asked for and not done."""
        return self.options is not None and not self.state.learned and not self._folder.exists()

    @property
    def _folder(self) -> Path:
        return self.state.folder.path / BASE

    def restore(self) -> None:
        """Take back what was kept; a torn part is taken away, so that it is made again, if nothing follows.

        Raises
        ------
        RunDirectoryError
            It is torn, and tasks were learned after it.
        """
        if self.options is None:
            return
        state, folder = self.state, self._folder
        problem = state.folder.problem(BASE) if folder.exists() else None
        if problem is not None:
            if state.learned:
                raise RunDirectoryError(f"{folder}: {problem}. Bring the folder back from a backup.")
            state.context.progress.say(f"{folder}: {problem}; it is made again.")
            state.folder.remove(BASE)
        self.told = state.has_strategy(folder)
        if state.learned or not folder.exists():
            return
        if (folder / "model").exists():
            load_weights(state.model, folder / "model")
        if self.told:
            state.read_strategy(folder)
        state.read_memory(folder)

    def seen(self, stage: Stage) -> Stage:
        """A stage as the strategy counts it."""
        if not self.told:
            return stage
        total = None if stage.total is None else stage.total + 1
        return replace(stage, index=stage.index + 1, total=total)

    def check(self) -> None:
        """See before anything is trained that the file can be read and learned, and say what is cut of it.

        Raises
        ------
        DataError
            It can't.
        """
        if self.options is not None and self.options.general is not None and self.due:
            self.look.at(Task("protect_base.general", self._given, ()))

    def end(self, total: int | None) -> None:
        """Write the rows, let the strategy end the task, and keep what comes of it.

        Raises
        ------
        ConfigError
            None of the rows that were written can be used, or the strategy makes nothing of them, and
        ``protect_base.optional`` is false.
        """
        state, progress = self.state, self.state.context.progress
        assert self.options is not None
        started = time.perf_counter()
        with state.folder.part(BASE) as folder:
            state.context.folder = folder
            if self.options.general is not None:
                rows, written = self._given, None
            else:
                written = self._written()
                rows = written.rows
                written.save(folder)
            task = Task(BASE, tuple(rows), ())
            if rows:
                self._tell(Stage(BASE, (task,), 0, None if total is None else total + 1))
            learned = datetime.now(UTC).isoformat(timespec="seconds")
            about = {"learned": learned, "seconds": round(time.perf_counter() - started, 1)}
            source = {"data": self.options.general} if written is None else {}
            write_task(folder, task, {**about, **source})
        if written is not None:
            said = written.said().removesuffix("; there is nothing of this task to replay")
            progress.say(f"  the base's own rows: {said}")
        if not rows:
            progress.say("protect_base: nothing was written that can be used; the base isn't held.")

    def _tell(self, stage: Stage) -> None:
        state, context, folder = self.state, self.state.context, self.state.context.folder
        state.model.eval()
        torch.manual_seed(context.seed * 1000)
        if STRATEGIES[state.config.strategy.name].ends_untrained:
            before = _shapes(state.model)
            state.strategy.begin(context, stage)
            state.strategy.end(context, stage)
            tensors = state.write_strategy(folder)
            if tensors and not any(bool(tensor.any()) for tensor in tensors.values()):
                self._nothing_held()
            if _shapes(state.model) != before:  # a new adapter of the task's own; else they are the base's
                save_model(state.model, context.tokenizer, folder / "model")
            self.told = True
        if state.replay is not None:
            state.replay.learned(stage.tasks, context.seed, context.write)
        state.write_memory(folder)
        state.model.zero_grad(set_to_none=True)

    def _nothing_held(self) -> None:
        """A LoRA that starts from zero passes no relevance on, so that a rating by relevance is zero."""
        assert self.options is not None
        problem = (
            "protect_base: of the base's rows the strategy made zeros alone, so it holds nothing of it. "
            "A new adapter passes on no relevance; importances that work there are "
            "`strategy.importance=fisher` and `strategy.importance.weighting=answer`."
        )
        if not self.options.optional:
            raise ConfigError(problem)
        self.state.context.progress.say(problem)

    @cached_property
    def _given(self) -> Sequence[Example]:
        """The rows of `general`: those that were looked at are those that are learned."""
        assert self.options is not None
        assert self.options.general is not None
        try:
            rows = load_task(self.options.general).train
        except DataError as error:
            raise DataError(f"protect_base.general: {error}") from error
        return subsample(rows, self.options.rows, self.state.config.seed, BASE)

    def _written(self) -> Written:
        """Rows of the base's own: a chat, or running text where its tokenizer frames none."""
        config, context, options = self.state.config, self.state.context, self.options
        assert options is not None
        opening, tokens = chat_opening(context.encoder), options.tokens
        lengths = (tokens, tokens) if opening is not None else (tokens - tokens // 2, tokens // 2)
        limits = dict(zip(("max_prompt_tokens", "max_completion_tokens"), lengths, strict=True))
        template = config.template.model_copy(update=limits)
        encoder = Encoder(context.tokenizer, template, encoder_decoder=context.encoder.encoder_decoder)
        writing = options.writing or WritingOptions()
        if writing.cut is None:
            writing = writing.model_copy(update={"cut": "kept"})
        with context.progress.bar("write rows of the base", total=options.rows) as bar:
            written = write_rows(
                context.model,
                encoder,
                running(encoder) if opening is None else opening,
                writing,
                count=options.rows,
                seed=f"{context.seed} {BASE}",
                batch_size=config.evaluation.batch_size,
                progress=bar,
                kept=context.folder / CHECKPOINTS,
            )
        if not written.rows and not options.optional:
            raise ConfigError(
                f"protect_base: {written.said().partition(';')[0]}: the model writes nothing that can be "
                "used. Give rows in protect_base.general (`--general FILE`), more protect_base.tokens, or "
                "leave protect_base out."
            )
        return written


def _shapes(model: torch.nn.Module) -> dict[str, tuple[object, ...]]:
    """What tells whether trained weights are others: their sizes, and sums of them."""
    trained = ((n, p.detach()) for n, p in model.named_parameters() if "lora_" in n or p.requires_grad)
    return {
        n: (tuple(p.shape), float(p.double().sum()), float(p.double().square().sum())) for n, p in trained
    }
