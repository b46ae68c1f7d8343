"""Task 0: what the base can do, from rows that it writes itself, ended like any other task."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from holdfast.errors import ConfigError, DataError, RunDirectoryError
from holdfast.evaluation.writing import Written, write_rows
from holdfast.learner.known import write_task
from holdfast.models import load_weights, save_model
from holdfast.storage import write_json, write_tensors
from holdfast.strategies import STRATEGIES, Stage
from holdfast.tasks import Encoder, load_task
from holdfast.tasks.memory import WritingOptions
from holdfast.tasks.opening import chat_opening, running
from holdfast.tasks.options import subsample
from holdfast.tasks.task import Example, Task

if TYPE_CHECKING:
    from holdfast.learner.learner import Learner

BASE = "base"  # the task's name, and its part of the folder


class BaseTask:
    """The base as the task before the first one: it is rated, remembered and shown, and never trained.

    The strategy is told as of any task (`begin`, then `end`, with index 0; those that follow count from 1),
    if it declares that it can end a task that was not trained; a ``replay:`` memory takes the rows in either
    case. What comes of it is one part of the folder, committed as a whole before the first task begins.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner, self.options = learner, learner.config.protect_base
        self.told = False  # whether the strategy has ended it

    @property
    def due(self) -> bool:
        """Whether it is asked for and not done."""
        folder = self.learner.folder.path / BASE
        return self.options is not None and not self.learner.learned and not folder.exists()

    def restore(self) -> None:
        """Take back what was kept; a torn part is taken away, so that it is made again, if nothing follows.

        Raises
        ------
        RunDirectoryError
            It is torn, and tasks were learned after it.
        """
        if self.options is None:
            return
        learner = self.learner
        problem = learner.folder.problem(BASE) if (learner.folder.path / BASE).exists() else None
        if problem is not None:
            if learner.learned:
                raise RunDirectoryError(
                    f"{learner.folder.path / BASE}: {problem}. Bring the folder back from a backup."
                )
            learner.progress.say(f"{learner.folder.path / BASE}: {problem}; it is made again.")
            learner.folder.remove(BASE)
        state = learner.folder.path / BASE / "strategy.json"
        self.told = state.is_file()
        if learner.learned or not (learner.folder.path / BASE).exists():
            return
        if (state.parent / "model").exists():
            load_weights(learner.model, state.parent / "model")
        if self.told:
            file = state.parent / "strategy.safetensors"
            learner.strategy.load_state_dict(
                load_file(file) if file.exists() else {}, json.loads(state.read_text(encoding="utf-8"))
            )
        memory = state.parent / "replay.json"
        if learner.replay is not None and memory.is_file():
            learner.replay.memory.load_state_dict(json.loads(memory.read_text(encoding="utf-8")))

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
            task = Task("protect_base.general", self._given(self.options.general), ())
            if problems := self.learner.look.told(task):
                raise DataError("\n".join(problems))

    def end(self, total: int | None) -> None:
        """Write the rows, let the strategy end the task, and keep what comes of it.

        Raises
        ------
        ConfigError
            None of the rows that were written can be used, or the strategy makes nothing of them, and
        ``protect_base.optional`` is false.
        """
        learner = self.learner
        assert self.options is not None
        started = time.perf_counter()
        with learner.folder.part(BASE) as folder:
            learner.context.folder = folder
            if self.options.general is not None:
                rows, written = self._given(self.options.general), None
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
            learner.progress.say(f"  the base's own rows: {said}")
        if not rows:
            learner.progress.say("protect_base: nothing was written that can be used; the base isn't held.")

    def _tell(self, stage: Stage) -> None:
        learner, folder = self.learner, self.learner.context.folder
        learner.model.eval()
        torch.manual_seed(learner.config.seed * 1000)
        if STRATEGIES[learner.config.strategy.name].ends_untrained:
            before = _shapes(learner.model)
            learner.strategy.begin(learner.context, stage)
            learner.strategy.end(learner.context, stage)
            tensors, values = learner.strategy.state_dict()
            if tensors and not any(bool(tensor.any()) for tensor in tensors.values()):
                self._nothing_held()
            if tensors:
                write_tensors(folder / "strategy.safetensors", tensors)
            if _shapes(learner.model) != before:  # a new adapter of the task's own; else they are the base's
                save_model(learner.model, learner.tokenizer, folder / "model")
            write_json(folder / "strategy.json", values)
            self.told = True
        if learner.replay is not None:
            learner.replay.learned(stage.tasks, learner.config.seed, learner.context.write)
            write_json(folder / "replay.json", learner.replay.memory.state_dict())
        learner.model.zero_grad(set_to_none=True)

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
        self.learner.progress.say(problem)

    def _given(self, file: str) -> Sequence[Example]:
        assert self.options is not None
        try:
            rows = load_task(file).train
        except DataError as error:
            raise DataError(f"protect_base.general: {error}") from error
        return subsample(rows, self.options.rows, self.learner.config.seed, BASE)

    def _written(self) -> Written:
        """Rows of the base's own: a chat, or running text where its tokenizer frames none."""
        learner, options = self.learner, self.options
        assert options is not None
        opening, tokens = chat_opening(learner.encoder), options.tokens
        lengths = (tokens, tokens) if opening is not None else (tokens - tokens // 2, tokens // 2)
        limits = dict(zip(("max_prompt_tokens", "max_completion_tokens"), lengths, strict=True))
        template = learner.config.template.model_copy(update=limits)
        encoder = Encoder(learner.tokenizer, template, encoder_decoder=learner.encoder.encoder_decoder)
        writing = options.writing or WritingOptions()
        if writing.cut is None:
            writing = writing.model_copy(update={"cut": "kept"})
        with learner.progress.bar("write rows of the base", total=options.rows) as bar:
            written = write_rows(
                learner.model,
                encoder,
                running(encoder) if opening is None else opening,
                writing,
                count=options.rows,
                seed=f"{learner.config.seed} {BASE}",
                batch_size=learner.config.evaluation.batch_size,
                progress=bar,
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
