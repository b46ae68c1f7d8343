"""What becomes of the base's general ability while a learner learns: KL to the base, after each task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.evaluation.general import (
    Answers,
    Divergence,
    ask_base,
    ask_own,
    divergence,
    encode_own,
    load_own,
    save_own,
)
from holdfast.learner.config import STAGES
from holdfast.learner.state import LearnerState
from holdfast.strategies import Stage
from holdfast.tasks.encode import Encoded
from holdfast.tasks.options import subsample
from holdfast.tasks.task import Example

GENERAL = "general"  # in the folder of the first task that was measured: the base's rows and its answers


class General:
    """Measures a learner on rows of the base's own, the same after every task, and on a new task's rows."""

    def __init__(self, state: LearnerState) -> None:
        self.state = state
        self._own: tuple[list[Encoded], Answers] | None = None
        self._new: tuple[list[Encoded], Answers] | None = None

    def begin(self, stage: Stage, folder: Path) -> None:
        """Before a task: make the base's rows if there are none, and ask the base the task's rows."""
        self._new = None
        options = self.state.config.evaluation
        try:
            self._own = self._kept() or self._kept(folder / GENERAL) or self._written(folder / GENERAL)
            examples: list[Example] = [example for task in stage.tasks for example in task.train]
            drawn = subsample(examples, options.general_rows, self.state.config.seed, stage.name, GENERAL)
            rows = self.state.context.encoder.many(drawn)
            self._new = (rows, self._ask(rows))
        except ConfigError as error:  # the base can't be had any more
            self.state.context.progress.say(
                f"general ability on the rows of '{stage.name}' isn't measured: {error}"
            )
        finally:
            self.state.base.free()

    def measured(self, task: str | None = None) -> dict[str, float | None]:
        """KL to the base on its own rows, and on those of the task that `begin` was given.

        Returns
        -------
        dict
            ``kl_base`` and ``kl_new``, in nats a token, and two standard errors of each (``_error``); None
            where the base could not be asked.
        """
        found: dict[str, float | None] = {}
        for key, kept, asked in (("kl_base", self._own, None), ("kl_new", self._new, task)):
            away = None if kept is None else self._from(*kept, asked)
            found[key] = None if away is None else away.kl
            found[f"{key}_error"] = None if away is None else away.error
        return found

    def of(self, rows: Sequence[Example] | None) -> Divergence:
        """KL to the base as the model stands, on its own rows or on others."""
        if rows is not None:
            encoded = self.state.context.encoder.many(rows)
            return self._from(encoded, self._ask(encoded))
        own = self._own or self._kept()
        if own is None:
            raise ConfigError(
                "Learner.kl_to_base: no rows of the base were kept; they are written before a task where "
                "evaluation.general is true. Set it, or give rows."
            )
        return self._from(*own)

    def _from(self, rows: list[Encoded], answers: Answers, task: str | None = None) -> Divergence:
        return divergence(self.state.route(task), self.state.context.tokenizer, rows, answers)

    def _ask(self, rows: list[Encoded]) -> Answers:
        with self._base() as base:
            return ask_base(base, self.state.context.tokenizer, rows)

    def _base(self) -> AbstractContextManager[Any]:
        """The base inside the block; before the first task it is the model itself."""
        state = self.state
        return state.base.answering(state.model) if state.learned else nullcontext(state.model)

    def _written(self, folder: Path) -> tuple[list[Encoded], Answers] | None:
        context, count = self.state.context, self.state.config.evaluation.general_rows
        with self._base() as base:
            found = ask_own(base, context.tokenizer, count, context.seed)
        if found is None:
            context.progress.say("general ability isn't measured on the base's own rows: it writes nothing.")
            return None
        rows, encoded, answers = found
        save_own(folder, rows, answers)
        return encoded, answers

    def _kept(self, folder: Path | None = None) -> tuple[list[Encoded], Answers] | None:
        """What was kept in a folder, or in that of an earlier task."""
        root = self.state.folder
        places = [root.path / part / GENERAL for part in root.parts(STAGES)] if folder is None else [folder]
        kept = next((found for place in places if (found := load_own(place)) is not None), None)
        return None if kept is None else (self._encode(kept[0]), kept[1])

    def _encode(self, rows: Sequence[Example]) -> list[Encoded]:
        return encode_own(rows, self.state.context.tokenizer, self.state.context.encoder.encoder_decoder)
